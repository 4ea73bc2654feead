package engine

import (
	"io"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// The OCI runtime finds a command and becomes it by execve(2) only after it has reported the start.
// If the kernel refuses that, runc's own process prints the reason and ends: the engine knows of a
// command that was started, printed a line and failed.

// runcFailed are the exit codes of runc's process then: 1 before runc 1.2, 255 since.
var runcFailed = []int{1, 255}

// refusals are the errors of execve(2).
var refusals = []unix.Errno{
	unix.E2BIG, unix.EACCES, unix.EAGAIN, unix.EFAULT, unix.EINVAL, unix.EIO, unix.EISDIR, unix.ELIBBAD, unix.ELOOP,
	unix.EMFILE,
	unix.ENAMETOOLONG, unix.ENFILE, unix.ENOENT, unix.ENOEXEC, unix.ENOMEM, unix.ENOTDIR, unix.EPERM, unix.ETXTBSY,
}

// head passes on what is written, and keeps the beginning.
type head struct {
	to   io.Writer
	text []byte // at most maxStartText bytes
}

// Write implements io.Writer.
func (h *head) Write(p []byte) (int, error) {
	room := maxStartText - len(h.text)
	h.text = append(h.text, p[:min(room, len(p))]...)
	return h.to.Write(p)
}

// isRefused reports whether a command was refused by execve, from its exit code and all that it has
// printed. The text names the command itself, so that what another command prints is not mistaken.
func isRefused(cmd string, exitCode int, stdout, stderr []byte, tty bool) bool {
	said, other := stderr, stdout
	if tty {
		said, other = stdout, nil
	}

	line, isLine := strings.CutSuffix(strings.ReplaceAll(string(said), "\r\n", "\n"), "\n")
	if !slices.Contains(runcFailed, exitCode) || len(other) > 0 || len(said) >= maxStartText || !isLine {
		return false
	}

	for _, refusal := range refusals {
		file, ok := strings.CutSuffix(line, ": "+refusal.Error())
		if !ok {
			continue
		}
		file, ok = strings.CutPrefix(file, "exec ")
		return ok && (file == cmd || !strings.Contains(cmd, "/") && strings.HasSuffix(file, "/"+cmd))
	}

	return false
}
