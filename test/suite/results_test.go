package suite

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestResults reads results with a test that failed before it passed, and with a cut line.
func TestResults(t *testing.T) {
	r := NewReport(t, t.TempDir(), "", false)
	const lines = `
{"Test":"a","State":"failed","Message":"m","Seconds":1}
{"Test":"b","State":"passed"}
{"Test":"c","State":"timedout"}
{"Test":"a","State":"passed"}
{"Test":"d","State":"pas
{"Test":"e","State":"skipped"}`
	if err := os.WriteFile(filepath.Join(string(r), progressFile), []byte(lines), 0o600); err != nil {
		t.Fatal(err)
	}

	want := Results{
		Failures: []string{"timedout: c"},
		Count:    map[string]int{"passed": 2, "timedout": 1, "skipped": 1},
	}
	if d := cmp.Diff(want, r.Results(t)); d != "" {
		t.Errorf("results: %s", d)
	}

	if resumed := NewReport(t, string(r), "", true); cmp.Diff(want, resumed.Results(t)) != "" {
		t.Error("a resumed run lost its results")
	}

	NewReport(t, string(r), "", false)
	if _, err := os.Stat(filepath.Join(string(r), progressFile)); !os.IsNotExist(err) {
		t.Errorf("a new run kept earlier results: %v", err)
	}
}
