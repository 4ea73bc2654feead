package engine

import (
	"io"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// The OCI runtime reports the start of a command before it calls execve(2). If execve fails, the
// process of runc prints the error and exits. To the engine, this is a command that was started,
// printed a line and failed.

// runcExitCodes are the exit codes of runc after a failed execve: 1 before runc 1.2, 255 since.
var runcExitCodes = []int{1, 255}

// execveErrors are the errors of execve(2).
var execveErrors = []unix.Errno{
	unix.E2BIG, unix.EACCES, unix.EAGAIN, unix.EFAULT, unix.EINVAL, unix.EIO, unix.EISDIR, unix.ELIBBAD, unix.ELOOP,
	unix.EMFILE, unix.ENAMETOOLONG, unix.ENFILE, unix.ENOENT, unix.ENOEXEC, unix.ENOMEM, unix.ENOTDIR, unix.EPERM,
	unix.ETXTBSY,
}

// prefixWriter passes on writes and records the beginning of the text.
type prefixWriter struct {
	to   io.Writer
	text []byte // at most maxStartText bytes
}

// Write implements io.Writer.
func (w *prefixWriter) Write(p []byte) (int, error) {
	space := maxStartText - len(w.text)
	w.text = append(w.text, p[:min(space, len(p))]...)
	return w.to.Write(p)
}

// isRefused reports whether execve of a command failed, judging by its exit code and its complete
// output. The error message contains the command itself, so the output of other commands does not
// match.
func isRefused(cmd string, exitCode int, stdout, stderr []byte, tty bool) bool {
	message, other := stderr, stdout
	if tty {
		message, other = stdout, nil
	}

	line, isLine := strings.CutSuffix(strings.ReplaceAll(string(message), "\r\n", "\n"), "\n")
	if !slices.Contains(runcExitCodes, exitCode) || len(other) > 0 || len(message) >= maxStartText || !isLine {
		return false
	}

	for _, execveError := range execveErrors {
		file, ok := strings.CutSuffix(line, ": "+execveError.Error())
		if !ok {
			continue
		}

		file, ok = strings.CutPrefix(file, "exec ")
		return ok && (file == cmd || !strings.Contains(cmd, "/") && strings.HasSuffix(file, "/"+cmd))
	}

	return false
}
