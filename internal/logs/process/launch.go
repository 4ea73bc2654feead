package process

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"cri-dockerd/internal/process"
	"cri-dockerd/internal/safefs"
	"cri-dockerd/internal/text"
)

// maxLogSize is the size, in bytes, at which the log of launched processes is truncated. Each
// process writes a line or two.
const maxLogSize = 1 << 20

// Launch starts the log-driver process with the daemon's flags in its own session, so that a
// restart or an upgrade of the daemon does not affect it. With systemd, cri-docker-log.socket
// starts the process instead. If the process ends before this one, ended receives its last line of
// output.
func Launch(runDirectory string, flags ...string) (ended <-chan error, err error) {
	dir := directory(runDirectory)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}

	out, err := os.OpenFile(filepath.Join(dir, "log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer out.Close()

	if st, err := out.Stat(); err == nil && st.Size() > maxLogSize {
		if err := out.Truncate(0); err != nil {
			return nil, err
		}
	}

	// /proc/self/exe is the running program even after another release has replaced the file.
	args := append([]string{Command, "--run-directory=" + runDirectory}, flags...)
	//nolint:gosec // the arguments are the daemon's own flags
	// #nosec G204 -- the program is this one, the arguments are its own flags
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Env = process.EnvironWithoutSystemd()
	if err := cmd.Start(); err != nil {
		return nil, err
	}

	end := make(chan error, 1)
	go func() {
		err := cmd.Wait()
		end <- fmt.Errorf("%w: %s", err, readLastLine(out.Name()))
	}()

	return end, nil
}

// readLastLine returns the last line of a log.
func readLastLine(file string) string {
	b, err := safefs.ReadFile(file, 2*maxLogSize)
	if err != nil {
		return err.Error()
	}
	all := strings.TrimSpace(string(b))
	return text.Clean(all[strings.LastIndexByte(all, '\n')+1:], text.MaxMessage)
}
