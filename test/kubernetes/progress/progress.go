// Package progress makes runs of Kubernetes' suites resumable, and runs parts of them. It appends
// the result of each test to the file in the environment variable PROGRESS, and skips the tests
// that passed according to this file. SHARD=1/4 skips the tests outside of the first of four parts.
// hack/kubernetes.sh links the package into the suites.
package progress

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"slices"
	"time"

	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/ginkgo/v2/types"
	"k8s.io/kubernetes/test/e2e/framework"
)

// Result is the result of a test, one line of the file.
type Result struct {
	Test    string
	State   string // passed, skipped, failed, timedout, …
	Message string `json:",omitempty"` // reason of a failure or of a skip by the test itself
	Seconds float64
	Time    time.Time
}

// messageSize limits messages, in bytes.
const messageSize = 4000

// The reasons to skip a test.
const (
	again     = "passed in an earlier run"
	elsewhere = "part of another shard"
)

var _ = register()

// register has each framework of the suite add nodes to the tests. Top-level nodes would be lost:
// Kubernetes lists the tests first by a preview, and Ginkgo keeps the containers only. Tests
// without a framework run every time, and are missing in the file.
func register() bool {
	file := os.Getenv("PROGRESS")
	if file == "" {
		return false
	}

	passed, err := read(file)
	if err != nil {
		panic(fmt.Sprintf("progress: %v", err))
	}

	p := progress{file: file, passed: passed, part: 1, parts: 1}
	if s := os.Getenv("SHARD"); s != "" {
		if _, err := fmt.Sscanf(s, "%d/%d", &p.part, &p.parts); err != nil || p.part < 1 || p.part > p.parts {
			panic(fmt.Sprintf("progress: SHARD=%s is no part such as 1/4", s))
		}
	}

	framework.NewFrameworkExtensions = append(framework.NewFrameworkExtensions, func(*framework.Framework) {
		ginkgo.BeforeEach(p.skip)
		ginkgo.ReportAfterEach(p.record)
	})

	return true
}

// progress is the state of a process of a suite. Its tests run one after the other.
type progress struct {
	file        string
	passed      map[string]bool // by full text
	part, parts uint32
	last        time.Time // start of the last recorded test
}

// skip skips a test that passed or is part of another shard.
func (p *progress) skip() {
	test := ginkgo.CurrentSpecReport().FullText()
	if p.passed[test] {
		ginkgo.Skip(again)
	}
	if crc32.ChecksumIEEE([]byte(test))%p.parts != p.part-1 {
		ginkgo.Skip(elsewhere)
	}
}

// record appends the result of a test that ran. A test with several frameworks calls it for each.
func (p *progress) record(r ginkgo.SpecReport) {
	config, _ := ginkgo.GinkgoConfiguration()
	if config.DryRun || r.StartTime.Equal(p.last) {
		return
	}
	if r.State == types.SpecStateSkipped && slices.Contains([]string{"", again, elsewhere}, r.Failure.Message) {
		return // not selected
	}

	p.last = r.StartTime
	if err := appendResult(p.file, r); err != nil {
		panic(fmt.Sprintf("progress: %v", err))
	}
}

// read returns the tests that passed. The last line may be cut.
func read(file string) (map[string]bool, error) {
	f, err := os.Open(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	defer f.Close()

	passed := map[string]bool{}
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 16<<20)
	for lines.Scan() {
		var r Result
		if json.Unmarshal(lines.Bytes(), &r) == nil {
			passed[r.Test] = r.State == types.SpecStatePassed.String()
		}
	}

	return passed, lines.Err()
}

// appendResult appends a line with one write: several processes append to the file. The line break
// comes first, to end a line that was cut.
func appendResult(file string, r ginkgo.SpecReport) error {
	line, err := json.Marshal(Result{
		Test:    r.FullText(),
		State:   r.State.String(),
		Message: r.Failure.Message[:min(len(r.Failure.Message), messageSize)],
		Seconds: r.RunTime.Seconds(),
		Time:    time.Now().UTC().Truncate(time.Second),
	})
	if err != nil {
		return err
	}

	f, err := os.OpenFile(file, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}

	_, err = f.Write(append([]byte{'\n'}, line...))

	return errors.Join(err, f.Close())
}
