package main

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// TestReportImages checks the limit, and expects a run without results to fail.
func TestReportImages(t *testing.T) {
	for _, test := range []struct {
		most int64
		want bool
	}{{pullRSSLimit, true}, {pullRSSLimit + 1, false}, {0, false}} {
		t.Run(fmt.Sprint(test.most), func(t *testing.T) {
			var out strings.Builder
			r := pullResults{cri: time.Second, docker: time.Second, most: test.most}

			got := reportImages(&out, r)
			if got != test.want || strings.Contains(out.String(), "FAIL") == test.want {
				t.Errorf("report returned %v\n%s", got, &out)
			}
		})
	}
}
