// Package task calls the containerd shim that runs a container, for what Docker's API lacks.
package task

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"

	api "github.com/containerd/containerd/api/runtime/task/v2"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"cri-dockerd/internal/proc"
	"cri-dockerd/internal/rootonly"
)

const (
	// service is the name of the task service under every version of containerd's API.
	service = "containerd.task.v2.Task"
	// maxAddress limits the file with the address of a shim, in bytes.
	maxAddress = 256
)

// socket is the form of a shim's address.
var socket = regexp.MustCompile(`^unix://(/run/containerd/s/[0-9a-f]{64})$`)

// Checkpoint writes the processes of a container into the directory images, and criu's log into the
// directory work (absolute paths on the engine's node). The container continues to run. pid is the
// container's main process. FailedPrecondition if the container has no running shim of this
// project.
func Checkpoint(ctx context.Context, fs proc.FS, pid int, id, images, work string) error {
	c, err := dial(ctx, fs, pid, id)
	if err != nil {
		return err
	}
	defer c.Close()

	how := &options.CheckpointOptions{
		OpenTcp:             true,
		ExternalUnixSockets: true,
		Terminal:            true,
		FileLocks:           true,
		WorkPath:            work,
	}

	text, err := proto.Marshal(how)
	if err != nil {
		return err
	}

	request := &api.CheckpointTaskRequest{
		ID:      id,
		Path:    images,
		Options: &anypb.Any{TypeUrl: string(how.ProtoReflect().Descriptor().FullName()), Value: text},
	}

	return errgrpc.ToNative(c.Call(ctx, service, "Checkpoint", request, &emptypb.Empty{}))
}

// dial connects to the shim of a container's main process, its parent.
func dial(ctx context.Context, fs proc.FS, pid int, id string) (*ttrpc.Client, error) {
	address, err := findAddress(fs, pid, id)
	if err != nil {
		return nil, fmt.Errorf("find the shim of container %s: %w: %w", id, err, errdefs.ErrFailedPrecondition)
	}

	conn, err := rootonly.Dial(ctx, "unix", address)
	if err != nil {
		return nil, fmt.Errorf("connect to the shim of container %s: %w: %w", id, err, errdefs.ErrFailedPrecondition)
	}

	return ttrpc.NewClient(conn), nil
}

// findAddress returns the socket of the shim. The shim's working directory is the bundle of the
// pod's first container, with a file of the address.
func findAddress(fs proc.FS, pid int, id string) (string, error) {
	main, err := fs.Open(strconv.Itoa(pid))
	if err != nil {
		return "", err
	}
	defer main.Close()

	if !main.InCgroup(id) {
		return "", fmt.Errorf("process %d does not belong to it", pid)
	}

	parent, err := main.Parent()
	if err != nil {
		return "", err
	}

	shim, err := fs.Open(strconv.Itoa(parent))
	if err != nil {
		return "", err
	}
	defer shim.Close()

	text, err := shim.ReadFile("cwd/address", maxAddress)
	if err != nil {
		return "", err
	}

	// The parent may have ended before its directory was opened.
	if again, err := main.Parent(); err != nil || again != parent {
		return "", errors.Join(errors.New("the shim has ended"), err)
	}

	address := socket.FindStringSubmatch(strings.TrimSpace(string(text)))
	if address == nil {
		return "", fmt.Errorf("address %q is not a socket of containerd", text)
	}

	return address[1], nil
}
