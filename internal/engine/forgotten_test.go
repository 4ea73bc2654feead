package engine

import (
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"cri-dockerd/internal/model"
)

// TestKillForgotten holds that only a container that the engine has never started, or does not
// have, loses its processes, and that no process of another container is hit.
func TestKillForgotten(t *testing.T) {
	const never = `{"Status":"created","StartedAt":"0001-01-01T00:00:00Z"}`
	for name, c := range map[string]struct {
		state string // the engine's answer, "" for an unknown container
		kill  bool
	}{
		"removed": {kill: true},
		"created": {state: never, kill: true},
		"failed":  {state: `{"Status":"exited","ExitCode":128,"StartedAt":"0001-01-01T00:00:00Z"}`, kill: true},
		"running": {state: `{"Status":"running","Running":true,"Pid":1,"StartedAt":"2026-01-02T03:04:05Z"}`},
		"paused": {
			state: `{"Status":"paused","Running":true,"Paused":true,"Pid":1,"StartedAt":"2026-01-02T03:04:05Z"}`,
		},
		"exited":       {state: `{"Status":"exited","ExitCode":1,"StartedAt":"2026-01-02T03:04:05Z"}`},
		"not readable": {state: `{`},
	} {
		t.Run(name, func(t *testing.T) {
			proc := t.TempDir()
			inside, outside := sleeperIn(t, proc, idA), sleeperIn(t, proc, strings.Repeat("b", 64))
			e := engineOf(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Api-Version", "1.41")
				w.Header().Set("Content-Type", "application/json")
				switch {
				case strings.HasSuffix(r.URL.Path, "/_ping"):
				case c.state != "" && strings.HasSuffix(r.URL.Path, "/containers/"+idA+"/json"):
					fmt.Fprintf(w, forgottenContainer, idA, c.state)
				default: // the image, too
					w.WriteHeader(http.StatusNotFound)
					fmt.Fprint(w, `{"message":"no such object"}`)
				}
			}))

			killed, err := e.killForgotten(t.Context(), proc, model.ContainerID(idA))
			if (killed == 1) != c.kill || (err != nil) != (name == "not readable") {
				t.Errorf("killed %d, %v; want it killed: %v", killed, err, c.kill)
			}

			if ended(inside) != c.kill {
				t.Errorf("the process has ended: %v, want %v", !c.kill, c.kill)
			}
			if ended(outside) {
				t.Error("a process of another container was killed")
			}
		})
	}
}

// forgottenContainer is the engine's answer to an inspect, of a container with an ID and a state.
const forgottenContainer = `{"Id":"%s","Name":"/k8s_a_p_n_u_0","Created":"2026-01-02T03:04:05Z","State":%s,"Image":"sha256:x",
	"HostConfig":{},"Config":{"Labels":{"io.kubernetes.docker.type":"container","io.kubernetes.sandbox.id":"` + sandboxOfForgotten + `"}}}`

const sandboxOfForgotten = "cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"

// sleeperIn starts a process that a procfs shows in the control group of a container.
func sleeperIn(t *testing.T, proc, container string) *exec.Cmd {
	t.Helper()
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}

	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	pid := strconv.Itoa(cmd.Process.Pid)
	dir := filepath.Join(proc, pid)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}

	if err := os.Symlink("/proc/"+pid+"/stat", filepath.Join(dir, "stat")); err != nil {
		t.Fatal(err)
	}

	cgroup := "3:cpu:/kubepods/pod-x/" + container + "\n"
	if err := os.WriteFile(filepath.Join(dir, "cgroup"), []byte(cgroup), 0o644); err != nil {
		t.Fatal(err)
	}

	return cmd
}

// ended reports whether a process of ours has ended.
func ended(cmd *exec.Cmd) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", cmd.Process.Pid))
	_, rest, _ := cutLast(string(stat), ") ")
	return err != nil || strings.HasPrefix(rest, "Z")
}
