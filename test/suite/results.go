package suite

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"cri-dockerd/test/engines"
)

// progressFile has the result of each test, written by test/kubernetes/progress.
const progressFile = "progress.jsonl"

// Report is a directory with the results and logs of one or more runs.
type Report string

// NewReport creates the directory of a report below the cache, or at path. Unless the run is
// resumed, it removes the results of earlier runs.
func NewReport(tb engines.TB, path, name string, resume bool) Report {
	tb.Helper()
	if path == "" {
		path = filepath.Join(engines.Cache(), name)
	}

	path, err := filepath.Abs(path)
	if err == nil {
		err = os.MkdirAll(path, 0o755)
	}

	if err == nil && !resume {
		err = os.RemoveAll(filepath.Join(path, progressFile))
	}

	if err != nil {
		tb.Fatalf("report: %v", err)
	}

	return Report(path)
}

// Results is the last result of each test in all runs.
type Results struct {
	Failures []string       // state and name, sorted
	Count    map[string]int // number of tests by state: passed, skipped, failed, …
}

// Results reads the results.
func (r Report) Results(tb engines.TB) Results {
	tb.Helper()
	b, err := os.ReadFile(filepath.Join(string(r), progressFile))
	if err != nil {
		tb.Fatalf("no results: %v", err)
	}

	last := map[string]string{} // state by test
	for line := range bytes.Lines(b) {
		var result struct{ Test, State string }
		if json.Unmarshal(line, &result) == nil { // a line may be cut
			last[result.Test] = result.State
		}
	}

	results := Results{Count: map[string]int{}}
	for test, state := range last {
		results.Count[state]++
		if state != "passed" && state != "skipped" {
			results.Failures = append(results.Failures, state+": "+test)
		}
	}

	slices.Sort(results.Failures)

	return results
}

// String returns the counts and the failures.
func (r Results) String() string {
	return fmt.Sprintf("%v\n%s", r.Count, strings.Join(r.Failures, "\n"))
}
