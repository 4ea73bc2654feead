package sandbox

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// The state file in the bundle lets another process end the pause after its server was killed.

const (
	stateFile    = "pause.json"
	stateVersion = 1
	maxState     = 64 << 10 // bytes
)

// state is the content of the state file.
type state struct {
	Version int    `json:"v"`
	Pid     int    `json:"pid"`
	Start   string `json:"start"` // start time in the kernel's form: a PID may get another process
	Cgroup  string `json:"cgroup"`
	Exit    *Exit  `json:"exit,omitempty"` // of an ended pause
}

// writeState writes the state file. It replaces an earlier one as a whole.
func writeState(dir string, s state) error {
	s.Version = stateVersion
	text, err := json.Marshal(s)
	if err != nil {
		return err
	}

	path := filepath.Join(dir, stateFile)
	if err := os.WriteFile(path+".new", text, 0o600); err != nil {
		return err
	}

	return os.Rename(path+".new", path)
}

// readState reads the state file. The error is os.ErrNotExist for a container of an OCI runtime.
func readState(dir string) (state, error) {
	f, err := os.Open(filepath.Join(dir, stateFile))
	if err != nil {
		return state{}, err
	}
	defer f.Close()

	var s state
	if err := json.NewDecoder(io.LimitReader(f, maxState)).Decode(&s); err != nil {
		return state{}, fmt.Errorf("read %s: %w", f.Name(), err)
	}

	switch {
	case s.Version != stateVersion:
		return state{}, fmt.Errorf("read %s: version %d is unknown", f.Name(), s.Version)
	case !filepath.IsAbs(s.Cgroup) || filepath.Clean(s.Cgroup) != s.Cgroup || s.Cgroup == "/":
		return state{}, fmt.Errorf("read %s: control group %q is not a clean absolute path", f.Name(), s.Cgroup)
	}

	return s, nil
}

// startTime returns the start time of a process, in ticks since boot (proc_pid_stat(5), field 22).
func startTime(pid int) (string, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", err
	}

	const first, start = 3, 22 // the first field after the name, which may contain spaces
	fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
	if len(fields) <= start-first {
		return "", fmt.Errorf("/proc/%d/stat has %d fields", pid, len(fields))
	}

	return fields[start-first], nil
}

// Clean kills the pause of a bundle after the end of its server, and removes its control group. It
// returns the PID and the exit, as recorded by the server or as a kill. The error is os.ErrNotExist
// if no pause was started in this bundle.
func Clean(ctx context.Context, dir string) (pid int, exit Exit, err error) {
	s, err := readState(dir)
	if err != nil {
		return 0, exit, err
	}

	if s.Exit == nil {
		if err := s.kill(ctx, dir); err != nil {
			return s.Pid, exit, fmt.Errorf("kill the pause: %w", err)
		}
		s.Exit = &Exit{128 + int(unix.SIGKILL), time.Now()}
	}

	return s.Pid, *s.Exit, removeGroup(ctx, s.Cgroup)
}

// setOOMScore writes the oom_score_adj of a process.
func setOOMScore(pid int, score *int) error {
	if score == nil {
		return nil
	}

	file := fmt.Sprintf("/proc/%d/oom_score_adj", pid)

	return wrap(os.WriteFile(file, []byte(strconv.Itoa(*score)), 0), "OOM score %d", *score)
}
