package main

import (
	"strings"
	"testing"
	"time"
)

// TestReportImages checks the limit, and that a run without figures does not pass.
func TestReportImages(t *testing.T) {
	for _, test := range []struct {
		most int64
		want bool
	}{{pullRSSLimit, true}, {pullRSSLimit + 1, false}, {0, false}} {
		var out strings.Builder
		if got := reportImages(&out, pullFigures{
			cri:    time.Second,
			docker: time.Second,
			most:   test.most,
		}); got != test.want || strings.Contains(out.String(), "FAIL") == test.want {
			t.Errorf("%d bytes: %v\n%s", test.most, got, &out)
		}
	}
}
