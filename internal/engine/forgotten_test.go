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

// TestKillForgotten checks that only the processes of never started or unknown containers are
// killed, and that other containers keep their processes.
func TestKillForgotten(t *testing.T) {
	const never = `{"Status":"created","StartedAt":"0001-01-01T00:00:00Z"}`
	for name, c := range map[string]struct {
		state string // of the container in the engine, "" for an unknown container
		kill  bool
	}{
		"removed": {kill: true},
		"created": {state: never, kill: true},
		"failed":  {state: `{"Status":"exited","ExitCode":128,"StartedAt":"0001-01-01T00:00:00Z"}`, kill: true},
		"running": {state: `{"Status":"running","Running":true,"Pid":1,"StartedAt":"2026-01-02T03:04:05Z"}`},
		"paused": {
			state: `{"Status":"paused","Running":true,"Paused":true,"Pid":1,"StartedAt":"2026-01-02T03:04:05Z"}`,
		},
		"exited":     {state: `{"Status":"exited","ExitCode":1,"StartedAt":"2026-01-02T03:04:05Z"}`},
		"unreadable": {state: `{`},
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
				default: // including the image
					w.WriteHeader(http.StatusNotFound)
					fmt.Fprint(w, `{"message":"no such object"}`)
				}
			}))

			killed, err := e.killForgotten(t.Context(), proc, model.ContainerID(idA))
			if (killed == 1) != c.kill || (err != nil) != (name == "unreadable") {
				t.Errorf("killed %d processes, error %v; want them killed: %v", killed, err, c.kill)
			}

			if hasExited(inside) != c.kill {
				t.Errorf("process has exited: %v, want %v", !c.kill, c.kill)
			}
			if hasExited(outside) {
				t.Error("a process of another container was killed")
			}
		})
	}
}

// forgottenContainer is the engine's inspect response for a container with an ID and a state.
const forgottenContainer = `{"Id":"%s","Name":"/k8s_a_p_n_u_0","Created":"2026-01-02T03:04:05Z","State":%s,
	"Image":"sha256:x","HostConfig":{},"Config":{"Labels":{"io.kubernetes.docker.type":"container",
	"io.kubernetes.sandbox.id":"cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc"}}}`

// sleeperIn starts a process and adds it to a procfs, as a process in the control group of a
// container.
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

// hasExited reports whether a child process has exited.
func hasExited(cmd *exec.Cmd) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", cmd.Process.Pid))
	_, rest, _ := cutLast(string(stat), ") ")
	return err != nil || strings.HasPrefix(rest, "Z")
}
