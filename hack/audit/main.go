// Command audit reads what govulncheck found (-format json) and fails for every vulnerability in a
// module that the program calls. Those of Go's standard library are printed: they go with a newer
// Go.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
)

// message is a line of govulncheck's output (golang.org/x/vuln/internal/govulncheck.Message).
type message struct {
	Finding *struct {
		OSV          string `json:"osv"`
		FixedVersion string `json:"fixed_version"`
		Trace        []struct {
			Module   string `json:"module"`
			Function string `json:"function"`
		} `json:"trace"`
	} `json:"finding"`
}

func main() {
	f, err := os.Open(os.Args[1])
	if err != nil {
		fail(err)
	}
	defer f.Close()

	found := map[string]string{} // module and fix, by the vulnerability's ID
	failed := false
	for d := json.NewDecoder(f); ; {
		var m message
		if err := d.Decode(&m); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			fail(err)
		}

		if m.Finding == nil || len(m.Finding.Trace) == 0 || m.Finding.Trace[0].Function == "" { // imported, not called
			continue
		}

		module := m.Finding.Trace[0].Module
		found[m.Finding.OSV] = fmt.Sprintf("%s, fixed in %s", module, m.Finding.FixedVersion)
		failed = failed || module != "stdlib"
	}

	for _, id := range slices.Sorted(maps.Keys(found)) {
		fmt.Println(id, found[id])
	}

	if failed {
		fail(errors.New("a module has a vulnerability that the program calls; update it"))
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "audit:", err)
	os.Exit(1)
}
