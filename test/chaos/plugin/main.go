// Command plugin is a stand-in for CNI plugins in tests. It queries the test for instructions
// before and after the real plugin: its directory is DIR, the test listens on DIR.sock, and the
// real plugins are in DIR.real. Without a listening test it behaves like the real plugin.
package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
)

// question is the plugin's query.
type question struct {
	Plugin, Command, Container string
	After                      bool // the real plugin has completed
	Failed                     bool // without a fault
}

func main() {
	file, err := os.Executable()
	if err != nil {
		fmt.Fprintln(os.Stderr, "plugin:", err)
		os.Exit(1)
	}

	dir, name := filepath.Dir(file), filepath.Base(os.Args[0])
	q := question{Plugin: name, Command: os.Getenv("CNI_COMMAND"), Container: os.Getenv("CNI_CONTAINERID")}

	obey(ask(dir+".sock", q))
	out, code := run(filepath.Join(dir+".real", name))
	q.After, q.Failed = true, code != 0
	obey(ask(dir+".sock", q))

	_, _ = os.Stdout.Write(out)
	os.Exit(code)
}

// ask returns the test's instruction, "" to continue.
func ask(socket string, q question) string {
	conn, err := net.Dial("unix", socket)
	if err != nil {
		return ""
	}
	defer conn.Close()

	if err := json.NewEncoder(conn).Encode(q); err != nil {
		return ""
	}

	answer, err := io.ReadAll(conn) // a hanging plugin gets no answer
	if err != nil {
		return ""
	}

	return string(answer)
}

// obey follows the test's instruction.
func obey(answer string) {
	switch answer {
	case "fail":
		fmt.Println(`{"cniVersion":"1.0.0","code":99,"msg":"broken by the test"}`)
		os.Exit(1)

	case "garbage":
		_, _ = os.Stdout.Write([]byte("\377\376\033[2J garbage"))
		os.Exit(0)

	case "lie":
		fmt.Println(`{"cniVersion":"1.0.0","interfaces":[{"name":"eth9"}],"ips":[{"address":"0.0.0.0/0"}]}`)
		os.Exit(0)

	case "nothing":
		os.Exit(0)
	}
}

// run runs the real plugin.
func run(program string) (out []byte, code int) {
	cmd := exec.Command(program)
	var stdout bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, &stdout, os.Stderr
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		return stdout.Bytes(), exit.ExitCode()
	}

	if err != nil {
		fmt.Fprintln(os.Stderr, "plugin:", err)
		return nil, 1
	}

	return stdout.Bytes(), 0
}
