package main

import (
	"strings"
	"testing"
	"time"
)

// TestReportLogs checks that each limit can fail by itself.
func TestReportLogs(t *testing.T) {
	fine := func() logFigures {
		r := logRun{took: time.Second, engine: 100 * time.Millisecond, own: 20 * time.Millisecond}
		j := logRun{took: time.Second, engine: 100 * time.Millisecond}
		return logFigures{cri: []logRun{r, r, r}, jsonFile: []logRun{j, j, j}, rss: logRSSLimit, idle: logIdleLimit}
	}

	o := logOptions{lines: 1000, busy: 100}
	var out strings.Builder
	if !reportLogs(&out, fine(), o) || strings.Contains(out.String(), "FAIL") {
		t.Errorf("figures at their limits:\n%s", &out)
	}

	for what, change := range map[string]func(*logFigures){
		"slower":     func(f *logFigures) { f.cri[0].took++; f.cri[1].took++ },
		"dearer":     func(f *logFigures) { f.cri[0].own += time.Millisecond; f.cri[2].own += time.Millisecond },
		"larger":     func(f *logFigures) { f.rss++ },
		"never idle": func(f *logFigures) { f.idle++ },
		"engine idle": func(f *logFigures) {
			f.jsonFile[0].engine, f.jsonFile[1].engine = time.Millisecond, time.Millisecond
		},
	} {
		f := fine()
		change(&f)
		out.Reset()
		if reportLogs(&out, f, o) || strings.Count(out.String(), "FAIL") != 1 {
			t.Errorf("%s:\n%s", what, &out)
		}
	}

	f := fine()
	f.cri[0].took *= 2 // one bad pair is the machine's mood
	if !reportLogs(&out, f, o) {
		t.Error("one pair decides")
	}
}
