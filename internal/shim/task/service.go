// Package task is the task service of the shim server. It starts pauses itself (package sandbox),
// and passes everything else to containerd's own task service for runc, after it has applied the
// daemon's annotation to the spec (package bundle).
package task

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"

	api "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/runc/options"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/typeurl/v2"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"

	"cri-dockerd/internal/shim/bundle"
	"cri-dockerd/internal/shim/idmap"
	"cri-dockerd/internal/shim/launcher"
	"cri-dockerd/internal/shim/sandbox"
)

// Service is the task service of one pod. It is safe for concurrent use.
type Service struct {
	api.TTRPCTaskService // of runc
	publisher            *Publisher
	events               *events

	mu         sync.Mutex
	pauses     map[string]*sandbox.Pause // by container ID
	containers map[string]container      // of runc, by container ID
}

// container is a container of runc.
type container struct {
	bundle string // its directory
	exec   bundle.Exec
	root   string // the engine's root of a container with a user namespace, "" for others
}

// New returns a service in front of runc's. publisher receives the events of runc's service, and
// those of pauses until ctx ends.
func New(ctx context.Context, runc api.TTRPCTaskService, publisher *Publisher) *Service {
	s := &Service{
		TTRPCTaskService: runc,
		publisher:        publisher,
		events:           newEvents(publisher),
		pauses:           map[string]*sandbox.Pause{},
		containers:       map[string]container{},
	}

	go s.events.run(ctx)

	return s
}

// pause returns the pause with this container ID, nil for a container of runc.
func (s *Service) pause(id string) *sandbox.Pause {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.pauses[id]
}

// Create creates a container. The process of a pause runs from here on.
func (s *Service) Create(ctx context.Context, r *api.CreateTaskRequest) (*api.CreateTaskResponse, error) {
	b, err := bundle.Open(r.Bundle)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}

	if b.Want.Sandbox != nil {
		reason := unsupportedRequest(r)
		if reason == "" {
			var plan *sandbox.Plan
			if plan, reason = sandbox.NewPlan(b); reason == "" {
				return s.createPause(ctx, r, plan)
			}
		}
		log.G(ctx).WithField("id", r.ID).WithField("reason", reason).Info("runc starts the pause")
	}

	return s.createRunc(ctx, r, b)
}

// createRunc lets runc create a container from the edited spec.
func (s *Service) createRunc(
	ctx context.Context, r *api.CreateTaskRequest, b *bundle.Bundle,
) (_ *api.CreateTaskResponse, err error) {
	users, closeUsers, err := mapUsers(r.ID, b)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	defer func() {
		closeErr := closeUsers() // runc has mounts of its own
		if err != nil {
			closeErr = errors.Join(closeErr, idmap.Clean(r.ID))
		}
		if closeErr != nil {
			log.G(ctx).WithError(closeErr).WithField("id", r.ID).Error("remove the mapped mounts")
		}
	}()

	if err := b.Apply(sandbox.CanLimitHugepages, users); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}

	if r.Options, err = runcOptions(r.Options, b); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}

	s.mu.Lock()
	s.containers[r.ID] = newContainer(b)
	s.mu.Unlock()

	resp, err := s.TTRPCTaskService.Create(ctx, r)
	if err != nil {
		s.forget(r.ID)
		return nil, err
	}

	if err := s.publisher.watch(r.ID, int(resp.Pid)); err != nil { // runc's service watches, too
		log.G(ctx).WithError(err).WithField("id", r.ID).Warn("an OOM kill may be reported too late")
	}

	return resp, nil
}

// runcOptions returns the options of runc. Docker sends none for a shim selected by name.
func runcOptions(sent *anypb.Any, b *bundle.Bundle) (*anypb.Any, error) {
	o := &options.Options{SystemdCgroup: b.UsesSystemd()}
	if b.Want.UserNS != nil { // the process may open its output again (/dev/stdout)
		o.IoUid, o.IoGid = b.Want.UserNS.UIDs.First, b.Want.UserNS.GIDs.First
	}

	if sent != nil || proto.Equal(o, &options.Options{}) {
		return sent, nil
	}

	out, err := typeurl.MarshalAny(o)
	if err != nil {
		return nil, err
	}

	return &anypb.Any{TypeUrl: out.GetTypeUrl(), Value: out.GetValue()}, nil
}

func newContainer(b *bundle.Bundle) container {
	c := container{bundle: b.Dir, exec: b.Exec()}
	if b.Want.UserNS != nil {
		c.root = b.Spec.Root.Path
	}
	return c
}

func (s *Service) forget(id string) {
	s.publisher.unwatch(id)
	s.publisher.outputs.releaseAll(id)

	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.containers, id)
	delete(s.pauses, id)
}

// Exec adds a process to a container of runc.
func (s *Service) Exec(ctx context.Context, r *api.ExecProcessRequest) (*emptypb.Empty, error) {
	if p := s.pause(r.ID); p != nil {
		return nil, refuse("exec in pause %s: its image has no program", r.ID)
	}

	s.mu.Lock()
	c := s.containers[r.ID]
	s.mu.Unlock()
	if c.root != "" { // the engine has read the users in /etc
		if err := idmap.Refresh(c.root); err != nil {
			log.G(ctx).WithError(err).WithField("id", r.ID).Warn("refresh the engine's root")
		}
	}

	x := c.exec
	if !x.IsZero() && r.Spec != nil {
		process, err := x.Edit(r.Spec.Value)
		if err != nil {
			return nil, errgrpc.ToGRPC(err)
		}
		r.Spec.Value = process
	}

	if err := s.redirect(ctx, r, x.Output); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}

	resp, err := s.TTRPCTaskService.Exec(ctx, r)
	if err != nil {
		s.publisher.outputs.release(r.ID, r.ExecID)
	}

	return resp, err
}

// redirect redirects the output of an exec to the daemon's directory, if the daemon wants it. The
// output goes to the engine otherwise.
func (s *Service) redirect(ctx context.Context, r *api.ExecProcessRequest, dir string) error {
	if dir == "" || r.Spec == nil {
		return nil
	}

	process, token, err := bundle.TakeOutput(r.Spec.Value)
	if err != nil || token == "" {
		return err
	}

	r.Spec.Value = process
	if err := s.publisher.outputs.redirect(r, dir, token); err != nil {
		log.G(ctx).WithError(err).WithField("id", r.ID).Warn("the output of an exec goes to the engine")
	}

	return nil
}

// Delete deletes a stopped container, or a stopped process of an exec.
func (s *Service) Delete(ctx context.Context, r *api.DeleteRequest) (*api.DeleteResponse, error) {
	if p := s.pause(r.ID); p != nil {
		return s.deletePause(ctx, r, p)
	}

	s.mu.Lock()
	dir := s.containers[r.ID].bundle
	s.mu.Unlock()
	resp, err := s.TTRPCTaskService.Delete(ctx, r)
	if err == nil && r.ExecID == "" {
		s.forget(r.ID)
		if err := idmap.Clean(r.ID); err != nil { // the action "delete" tries again
			log.G(ctx).WithError(err).WithField("id", r.ID).Error("remove the mapped mounts")
			return resp, nil
		}
		recordDeletion(ctx, dir, resp)
	}

	return resp, err
}

// recordDeletion writes the response to a deletion into the bundle. containerd runs the action
// "delete" after each deletion, and the launcher answers it from this file. Without it the launcher
// starts this program and runc once more.
func recordDeletion(ctx context.Context, dir string, resp *api.DeleteResponse) {
	text, err := proto.Marshal(resp)
	if err == nil && dir != "" {
		err = os.WriteFile(filepath.Join(dir, launcher.DeletedFile), text, 0o600)
	}

	if err != nil {
		log.G(ctx).WithError(err).Warn("record the deletion")
	}
}

// Connect returns the PIDs of the server and of a container.
func (s *Service) Connect(ctx context.Context, r *api.ConnectRequest) (*api.ConnectResponse, error) {
	if p := s.pause(r.ID); p != nil {
		return &api.ConnectResponse{ShimPid: uint32(os.Getpid()), TaskPid: uint32(p.Pid)}, nil
	}
	return s.TTRPCTaskService.Connect(ctx, r)
}

// Shutdown ends the server if it has no container.
func (s *Service) Shutdown(ctx context.Context, r *api.ShutdownRequest) (*emptypb.Empty, error) {
	s.mu.Lock()
	n := len(s.pauses)
	s.mu.Unlock()
	if n > 0 {
		return &emptypb.Empty{}, nil
	}

	return s.TTRPCTaskService.Shutdown(ctx, r)
}
