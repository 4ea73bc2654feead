package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Results of a step.
const (
	resultPassed = "passed"
	resultFailed = "failed"
	resultNotRun = "not run"
)

// result is what a run of a step gave.
type result struct {
	Step    string
	About   string
	Result  string
	Note    string // the error, or why it did not run
	Begin   time.Time
	Seconds float64
}

// Duration returns the rounded time of the step.
func (r result) Duration() time.Duration {
	return time.Duration(r.Seconds * float64(time.Second)).Round(time.Second)
}

// results are the results in the directory of a run, in the order of the steps.
type results struct {
	file string
	list []result
}

// openResults reads the results of an earlier run if resume is set.
func openResults(dir string, resume bool) (*results, error) {
	r := &results{file: filepath.Join(dir, "results.json")}
	if !resume {
		return r, nil
	}

	b, err := os.ReadFile(r.file)
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err != nil {
		return nil, err
	}

	return r, json.Unmarshal(b, &r.list)
}

// passed reports whether a step has passed.
func (r *results) passed(step string) bool {
	for _, one := range r.list {
		if one.Step == step {
			return one.Result == resultPassed
		}
	}

	return false
}

// add records a result. It replaces an older one of the same step.
func (r *results) add(one result) error {
	found := false
	for i := range r.list {
		if r.list[i].Step == one.Step {
			r.list[i], found = one, true
		}
	}
	if !found {
		r.list = append(r.list, one)
	}

	b, err := json.MarshalIndent(r.list, "", "\t")
	if err != nil {
		return err
	}

	return os.WriteFile(r.file, b, 0o644)
}

// markdown returns a table of the results.
func (r *results) markdown() string {
	var b strings.Builder
	b.WriteString("| step | test | result | time | date |\n|---|---|---|---|---|\n")
	for _, one := range r.list {
		fmt.Fprintf(&b, "| %s | %s | %s | %s | %s |\n", one.Step, one.About, one.Result, one.Duration(),
			one.Begin.UTC().Format(time.DateOnly))
	}

	return b.String()
}
