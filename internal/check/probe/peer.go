package probe

import (
	"context"
	"errors"
	"net"
	"os"
	"syscall"

	"cri-dockerd/internal/check/finding"
	"cri-dockerd/internal/rootonly"
)

// dial connects to a unix socket of a process of root. It also returns the kind of the error.
func dial(ctx context.Context, path string) (net.Conn, finding.Problem, error) {
	if st, err := os.Stat(path); err == nil && st.Mode()&os.ModeSocket == 0 {
		return nil, finding.NoSocket, errors.New("not a socket")
	}
	c, err := rootonly.Dial(ctx, "unix", path)
	return c, problem(err), err
}

// problem returns the kind of a connection error.
func problem(err error) finding.Problem {
	var timeout net.Error
	var peer *rootonly.PeerError
	switch {
	case err == nil:
		return ""
	case errors.As(err, &peer):
		return finding.NotRoot
	case errors.Is(err, syscall.ENOENT):
		return finding.Missing
	case errors.Is(err, syscall.ECONNREFUSED):
		return finding.Refused
	case errors.Is(err, os.ErrPermission):
		return finding.Denied
	// A unix socket with a full queue of connections: its process accepts none.
	case errors.Is(err, syscall.EAGAIN), errors.Is(err, context.DeadlineExceeded),
		errors.As(err, &timeout) && timeout.Timeout():
		return finding.Silent
	}

	return finding.Other
}
