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

// register adds nodes to the suite, outside of all containers: they run before those of the suite.
func register() bool {
	file := os.Getenv("PROGRESS")
	if file == "" {
		return false
	}

	passed, err := read(file)
	if err != nil {
		panic(fmt.Sprintf("progress: %v", err))
	}

	part, parts := uint32(1), uint32(1)
	if s := os.Getenv("SHARD"); s != "" {
		if _, err := fmt.Sscanf(s, "%d/%d", &part, &parts); err != nil || part < 1 || part > parts {
			panic(fmt.Sprintf("progress: SHARD=%s is no part such as 1/4", s))
		}
	}

	ginkgo.BeforeEach(func() {
		test := ginkgo.CurrentSpecReport().FullText()
		if passed[test] {
			ginkgo.Skip(again)
		}
		if crc32.ChecksumIEEE([]byte(test))%parts != part-1 {
			ginkgo.Skip(elsewhere)
		}
	})

	ginkgo.ReportAfterEach(func(r ginkgo.SpecReport) {
		if r.State == types.SpecStateSkipped && slices.Contains([]string{"", again, elsewhere}, r.Failure.Message) {
			return // not selected
		}
		if err := appendResult(file, r); err != nil {
			panic(fmt.Sprintf("progress: %v", err))
		}
	})

	return true
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
