package main

import (
	"strings"
	"testing"
	"time"
)

// TestReportLogs expects each limit to fail independently.
func TestReportLogs(t *testing.T) {
	fine := func() logResults {
		r := logRun{took: time.Second, engine: 100 * time.Millisecond, own: 20 * time.Millisecond}
		j := logRun{took: time.Second, engine: 100 * time.Millisecond}
		return logResults{cri: []logRun{r, r, r}, jsonFile: []logRun{j, j, j}, rss: logRSSLimit, idle: logIdleLimit}
	}

	o := logOptions{lines: 1000, busy: 100}
	var out strings.Builder
	if !reportLogs(&out, fine(), o) || strings.Contains(out.String(), "FAIL") {
		t.Errorf("report of results at their limits:\n%s", &out)
	}

	for name, change := range map[string]func(*logResults){
		"slower":     func(f *logResults) { f.cri[0].took++; f.cri[1].took++ },
		"costlier":   func(f *logResults) { f.cri[0].own += time.Millisecond; f.cri[2].own += time.Millisecond },
		"larger":     func(f *logResults) { f.rss++ },
		"never idle": func(f *logResults) { f.idle++ },
		"engine idle": func(f *logResults) {
			f.jsonFile[0].engine, f.jsonFile[1].engine = time.Millisecond, time.Millisecond
		},
	} {
		t.Run(name, func(t *testing.T) {
			f := fine()
			change(&f)
			var out strings.Builder
			if reportLogs(&out, f, o) || strings.Count(out.String(), "FAIL") != 1 {
				t.Errorf("report:\n%s", &out)
			}
		})
	}

	f := fine()
	f.cri[0].took *= 2 // one bad pair is machine noise
	if !reportLogs(&out, f, o) {
		t.Error("one bad pair failed the report")
	}
}
