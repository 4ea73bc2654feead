package engine

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"cri-dockerd/internal/model"
)

// TestExecInStoppedContainer checks that the kind of an exec error depends on the container's
// state, for any error of the engine.
func TestExecInStoppedContainer(t *testing.T) {
	ended := exec.Command("true")
	if err := ended.Start(); err != nil {
		t.Fatal(err)
	}
	defer ended.Wait() //nolint:errcheck // the process is a zombie until then

	for end := time.Now().Add(20 * time.Second); !hasEnded("/proc", ended.Process.Pid) && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}

	running := os.Getpid()

	for name, c := range map[string]struct {
		step, state string
		is          func(error) bool
	}{
		"create, ended": {"/exec", `"Running":false,"Pid":0`, errdefs.IsFailedPrecondition},
		"create, paused": {"/exec", fmt.Sprintf(`"Running":true,"Paused":true,"Pid":%d`, running),
			errdefs.IsFailedPrecondition},
		"create, restarting": {"/exec", `"Running":true,"Restarting":true,"Pid":0`, errdefs.IsFailedPrecondition},
		"create, zombie": {"/exec", fmt.Sprintf(`"Running":true,"Pid":%d`, ended.Process.Pid),
			errdefs.IsFailedPrecondition},
		"create, running": {"/exec", fmt.Sprintf(`"Running":true,"Pid":%d`, running), errdefs.IsInvalidArgument},
		"create, removed": {"/exec", "", errdefs.IsNotFound},
		"start, ended":    {"/start", `"Running":false,"Pid":0`, errdefs.IsFailedPrecondition},
		"start, running": {"/start", fmt.Sprintf(`"Running":true,"Pid":%d`, running), func(err error) bool {
			return err != nil
		}},
		"start, removed": {"/start", "", errdefs.IsNotFound},
	} {
		t.Run(name, func(t *testing.T) {
			e := engineOf(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Api-Version", "1.41")
				w.Header().Set("Content-Type", "application/json")
				_, _ = io.Copy(io.Discard, r.Body)
				switch p := r.URL.Path; {
				case strings.HasSuffix(p, c.step):
					w.WriteHeader(http.StatusBadRequest)
					fmt.Fprint(w, `{"message":"OCI runtime exec failed: exec failed: cannot exec in a stopped `+
						`container: unknown"}`)

				case strings.HasSuffix(p, "/exec"):
					w.WriteHeader(http.StatusCreated)
					fmt.Fprintf(w, `{"Id":"%s"}`, idB)
				case strings.HasSuffix(p, "/containers/"+idA+"/json") && c.state == "":
					w.WriteHeader(http.StatusNotFound)
					fmt.Fprint(w, `{"message":"No such container"}`)
				case strings.HasSuffix(p, "/containers/"+idA+"/json"):
					fmt.Fprintf(w, `{"Id":"%s","State":{%s}}`, idA, c.state)
				}
			}))

			_, err := e.Exec(t.Context(), model.ContainerID(idA), Exec{Cmd: []string{"true"}})
			kinds := 0
			for _, is := range []func(error) bool{errdefs.IsNotFound, errdefs.IsFailedPrecondition,
				errdefs.IsInvalidArgument} {
				if is(err) {
					kinds++
				}
			}

			if !c.is(err) || kinds > 1 || name == "start, running" && kinds > 0 ||
				!strings.Contains(err.Error(), "exec in container "+idA) {
				t.Errorf("error of an unexpected kind: %v", err)
			}
		})
	}
}

// TestHasEnded uses the stat files of running, exiting, ended and removed processes.
func TestHasEnded(t *testing.T) {
	proc := t.TempDir()
	for pid, c := range map[int]struct {
		stat string
		want bool
	}{
		1: {"1 (a) b) S 0 1 1 0 -1 4194560 100", false},
		2: {"2 (a) D 0 2 2 0 -1 4194564 100", true},
		3: {"3 (a) Z 0 3 3 0 -1 4227084 100", true},
		4: {"", true},
		5: {"5 (a", false},
	} {
		dir := filepath.Join(proc, strconv.Itoa(pid))
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}

		if c.stat != "" {
			if err := os.WriteFile(filepath.Join(dir, "stat"), []byte(c.stat), 0o600); err != nil {
				t.Fatal(err)
			}
		}

		if got := hasEnded(proc, pid); got != c.want {
			t.Errorf("hasEnded for %q is %v, want %v", c.stat, got, c.want)
		}
	}
}
