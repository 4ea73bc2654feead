package conformance

import (
	"cmp"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// openExec opens the session of a command.
func (n *node) openExec(t *testing.T, id, script string) *websocket.Conn {
	t.Helper()
	r, err := n.Runtime.Exec(t.Context(), &runtimeapi.ExecRequest{
		ContainerId: id,
		Cmd:         sh(script),
		Stdout:      true,
		Stderr:      true,
	})
	if err != nil {
		t.Fatal(err)
	}

	return n.stream(t, r.Url)
}

// TestExecOutput verifies the output of sessions, which comes from the shim or from the engine: it
// is complete, ends with the command, and shows nothing of the way.
func TestExecOutput(t *testing.T) {
	each(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		id := n.start(t, n.runPod(t, cfg), cfg, sh("sleep 1000"))
		const size = 3 << 20
		for name, c := range map[string]struct {
			script, out, errOut string
			sizes               [2]int // instead of the text
			code                string
		}{
			"nothing":     {script: "exit 3", code: `"3"`},
			"environment": {script: "env | grep -c CRI_DOCKERD", out: "0\n", code: `"1"`},
			"both":        {script: "echo out; echo err >&2", out: "out\n", errOut: "err\n"},
			"closed":      {script: "echo out; exec >&- 2>&-; sleep 1; exit 5", out: "out\n", code: `"5"`},
			"background":  {script: "echo out; sleep 600 & exit 0", out: "out\n"},
			"late":        {script: "(sleep 0.1; echo late) & exit 0", out: "late\n"},
			"large outputs": {
				script: fmt.Sprintf("head -c %d /dev/zero >&2 & head -c %[1]d /dev/zero; wait", size),
				sizes:  [2]int{size, size},
			},
		} {
			t.Run(name, func(t *testing.T) {
				began := time.Now()
				got := collect(t, n.openExec(t, id, c.script), 3, "}")
				if c.sizes == [2]int{} && (got[1] != c.out || got[2] != c.errOut) {
					t.Errorf("stdout %.200q, stderr %.200q", got[1], got[2])
				}
				if c.sizes != [2]int{} && c.sizes != [2]int{len(got[1]), len(got[2])} {
					t.Errorf("%d bytes of stdout, %d of stderr", len(got[1]), len(got[2]))
				}
				if want := cmp.Or(c.code, "Success"); !strings.Contains(got[3], want) {
					t.Errorf("status %s", got[3])
				}
				if took := time.Since(began); took > time.Minute {
					t.Errorf("took %s", took)
				}
			})
		}
	})
}

// TestExecWithoutSession verifies that a command continues after its client has disconnected, and
// after the daemon was killed. No FIFO remains.
func TestExecWithoutSession(t *testing.T) {
	eachFresh(t, func(t *testing.T, n *node) {
		cfg := n.podConfig(t)
		id := n.start(t, n.runPod(t, cfg), cfg, sh("sleep 1000"))
		for name, end := range map[string]func(c *websocket.Conn){
			"client": func(c *websocket.Conn) { c.Close() },
			"daemon": func(*websocket.Conn) {
				n.Kill(t)
				n.Restart(t)
			},
		} {
			t.Run(name, func(t *testing.T) {
				file := "/tmp/" + name
				c := n.openExec(t, id, "echo first; until test -e "+file+".go; do sleep 0.1; done; "+
					"head -c 3000000 /dev/zero; touch "+file)
				if got := collect(t, c, 1, "first"); got[1] != "first\n" {
					t.Fatalf("%q", got)
				}

				end(c)
				n.exec(t, id, "touch", file+".go")
				eventually(t, "the end of the command", func() bool {
					r, err := n.Runtime.ExecSync(t.Context(),
						&runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"test", "-e", file}})
					return err == nil && r.ExitCode == 0
				})
			})
		}

		eventually(t, "the removal of the FIFOs", func() bool {
			left, err := os.ReadDir(filepath.Join(filepath.Dir(n.PinDir), "exec"))
			return len(left) == 0 && (err == nil || os.IsNotExist(err))
		})
	})
}
