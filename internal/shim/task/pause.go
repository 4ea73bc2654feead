package task

import (
	"context"
	"fmt"
	"strings"

	eventtypes "github.com/containerd/containerd/api/events"
	api "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/containerd/api/types/task"
	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/typeurl/v2"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"cri-dockerd/internal/shim/sandbox"
)

// unsupportedRequest returns the reason why runc must create a pause.
func unsupportedRequest(r *api.CreateTaskRequest) string {
	switch {
	case r.Terminal:
		return "the process has a terminal"
	case r.Checkpoint != "":
		return "it is restored from a checkpoint"
	case len(r.Rootfs) > 0:
		return "the shim must mount the root"
	case strings.Contains(r.Stdout+r.Stderr, "://"):
		return "the output goes to a program or a file"
	}

	return ""
}

// refuse returns an error of the kind FailedPrecondition.
func refuse(format string, args ...any) error {
	return errgrpc.ToGRPC(fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), errdefs.ErrFailedPrecondition))
}

// noProcess returns an error if a request to a pause concerns a process of an exec.
func noProcess(id, exec string) error {
	if exec == "" {
		return nil
	}
	return errgrpc.ToGRPC(fmt.Errorf("pause %s has no process %s: %w", id, exec, errdefs.ErrNotFound))
}

func (s *Service) createPause(
	ctx context.Context, r *api.CreateTaskRequest, plan *sandbox.Plan,
) (*api.CreateTaskResponse, error) {
	io := sandbox.Stdio{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr}
	p, err := sandbox.Start(ctx, plan, r.Bundle, io)
	if err != nil {
		return nil, errgrpc.ToGRPC(fmt.Errorf("start the pause: %w", err))
	}

	s.mu.Lock()
	s.pauses[r.ID] = p
	s.mu.Unlock()
	s.events.send(&eventtypes.TaskCreate{
		ContainerID: r.ID,
		Bundle:      r.Bundle,
		IO:          &eventtypes.TaskIO{Stdin: r.Stdin, Stdout: r.Stdout, Stderr: r.Stderr},
		Pid:         uint32(p.Pid),
	})

	go func() {
		if err := p.Finish(func(e sandbox.Exit) { s.publishExit(r.ID, p.Pid, e) }); err != nil {
			log.G(ctx).WithError(err).WithField("id", r.ID).Error("record the exit of the pause")
		}
	}()

	return &api.CreateTaskResponse{Pid: uint32(p.Pid)}, nil
}

func (s *Service) publishExit(id string, pid int, e sandbox.Exit) {
	s.events.send(&eventtypes.TaskExit{
		ContainerID: id,
		ID:          id,
		Pid:         uint32(pid),
		ExitStatus:  uint32(e.Code),
		ExitedAt:    timestamppb.New(e.At),
	})
}

// Start starts a container or a process of an exec.
func (s *Service) Start(ctx context.Context, r *api.StartRequest) (*api.StartResponse, error) {
	p := s.pause(r.ID)
	if p == nil {
		resp, err := s.TTRPCTaskService.Start(ctx, r)
		if err != nil && r.ExecID != "" { // the engine waits for the end of the output before it deletes the exec
			s.publisher.outputs.release(r.ID, r.ExecID)
		}
		return resp, err
	}

	if err := noProcess(r.ID, r.ExecID); err != nil {
		return nil, err
	}
	if err := p.Run(); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}

	s.events.send(&eventtypes.TaskStart{ContainerID: r.ID, Pid: uint32(p.Pid)})

	return &api.StartResponse{Pid: uint32(p.Pid)}, nil
}

func (s *Service) deletePause(
	ctx context.Context, r *api.DeleteRequest, p *sandbox.Pause,
) (*api.DeleteResponse, error) {
	if err := noProcess(r.ID, r.ExecID); err != nil {
		return nil, err
	}

	exit, err := p.Delete(ctx)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}

	s.forget(r.ID)
	resp := &api.DeleteResponse{
		Pid:        uint32(p.Pid),
		ExitStatus: uint32(exit.Code),
		ExitedAt:   timestamppb.New(exit.At),
	}
	s.events.send(&eventtypes.TaskDelete{
		ContainerID: r.ID,
		Pid:         resp.Pid,
		ExitStatus:  resp.ExitStatus,
		ExitedAt:    resp.ExitedAt,
	})

	recordDeletion(ctx, p.Bundle, resp)

	return resp, s.events.flush(ctx) // the server may end next
}

var statuses = map[sandbox.Status]task.Status{
	sandbox.Created: task.Status_CREATED,
	sandbox.Running: task.Status_RUNNING,
	sandbox.Paused:  task.Status_PAUSED,
	sandbox.Stopped: task.Status_STOPPED,
}

// State returns the state of a process.
func (s *Service) State(ctx context.Context, r *api.StateRequest) (*api.StateResponse, error) {
	p := s.pause(r.ID)
	if p == nil {
		return s.TTRPCTaskService.State(ctx, r)
	}

	if err := noProcess(r.ID, r.ExecID); err != nil {
		return nil, err
	}

	status, exit := p.State()
	resp := &api.StateResponse{
		ID:     r.ID,
		Bundle: p.Bundle,
		Pid:    uint32(p.Pid),
		Status: statuses[status],
		Stdin:  p.Stdio.Stdin,
		Stdout: p.Stdio.Stdout,
		Stderr: p.Stdio.Stderr,
	}
	if status == sandbox.Stopped {
		resp.ExitStatus, resp.ExitedAt = uint32(exit.Code), timestamppb.New(exit.At)
	}

	return resp, nil
}

// Kill sends a signal to a process.
func (s *Service) Kill(ctx context.Context, r *api.KillRequest) (*emptypb.Empty, error) {
	p := s.pause(r.ID)
	if p == nil {
		return s.TTRPCTaskService.Kill(ctx, r)
	}

	if err := noProcess(r.ID, r.ExecID); err != nil {
		return nil, err
	}

	return &emptypb.Empty{}, errgrpc.ToGRPC(p.Signal(unix.Signal(r.Signal)))
}

// Wait waits for the end of a process.
func (s *Service) Wait(ctx context.Context, r *api.WaitRequest) (*api.WaitResponse, error) {
	p := s.pause(r.ID)
	if p == nil {
		return s.TTRPCTaskService.Wait(ctx, r)
	}

	if err := noProcess(r.ID, r.ExecID); err != nil {
		return nil, err
	}

	exit, err := p.Wait(ctx)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}

	return &api.WaitResponse{ExitStatus: uint32(exit.Code), ExitedAt: timestamppb.New(exit.At)}, nil
}

// Pids returns the processes of a container.
func (s *Service) Pids(ctx context.Context, r *api.PidsRequest) (*api.PidsResponse, error) {
	p := s.pause(r.ID)
	if p == nil {
		return s.TTRPCTaskService.Pids(ctx, r)
	}
	return &api.PidsResponse{Processes: []*task.ProcessInfo{{Pid: uint32(p.Pid)}}}, nil
}

// Stats returns the usage of a container.
func (s *Service) Stats(ctx context.Context, r *api.StatsRequest) (*api.StatsResponse, error) {
	p := s.pause(r.ID)
	if p == nil {
		return s.TTRPCTaskService.Stats(ctx, r)
	}

	stats, err := p.Stats()
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}

	data, err := typeurl.MarshalAny(stats)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}

	return &api.StatsResponse{Stats: &anypb.Any{TypeUrl: data.GetTypeUrl(), Value: data.GetValue()}}, nil
}

// Update changes the limits of a container.
func (s *Service) Update(ctx context.Context, r *api.UpdateTaskRequest) (*emptypb.Empty, error) {
	p := s.pause(r.ID)
	if p == nil {
		return s.TTRPCTaskService.Update(ctx, r)
	}

	v, err := typeurl.UnmarshalAny(r.Resources)
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}

	limits, ok := v.(*specs.LinuxResources)
	if !ok {
		return nil, errgrpc.ToGRPC(fmt.Errorf("resources of type %T: %w", v, errdefs.ErrInvalidArgument))
	}

	return &emptypb.Empty{}, errgrpc.ToGRPC(p.Update(ctx, limits))
}

// Pause freezes a container.
func (s *Service) Pause(ctx context.Context, r *api.PauseRequest) (*emptypb.Empty, error) {
	p := s.pause(r.ID)
	if p == nil {
		return s.TTRPCTaskService.Pause(ctx, r)
	}

	if err := p.Freeze(); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	s.events.send(&eventtypes.TaskPaused{ContainerID: r.ID})

	return &emptypb.Empty{}, nil
}

// Resume continues a container after Pause.
func (s *Service) Resume(ctx context.Context, r *api.ResumeRequest) (*emptypb.Empty, error) {
	p := s.pause(r.ID)
	if p == nil {
		return s.TTRPCTaskService.Resume(ctx, r)
	}

	if err := p.Thaw(); err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	s.events.send(&eventtypes.TaskResumed{ContainerID: r.ID})

	return &emptypb.Empty{}, nil
}

// ResizePty changes the size of a terminal.
func (s *Service) ResizePty(ctx context.Context, r *api.ResizePtyRequest) (*emptypb.Empty, error) {
	if p := s.pause(r.ID); p != nil {
		return nil, refuse("resize the terminal of pause %s: it has none", r.ID)
	}
	return s.TTRPCTaskService.ResizePty(ctx, r)
}

// CloseIO closes the standard input of a process. A pause has none.
func (s *Service) CloseIO(ctx context.Context, r *api.CloseIORequest) (*emptypb.Empty, error) {
	if p := s.pause(r.ID); p != nil {
		return &emptypb.Empty{}, nil
	}
	return s.TTRPCTaskService.CloseIO(ctx, r)
}

// logFailure logs an event that containerd did not accept.
func logFailure(ctx context.Context, err error) {
	log.G(ctx).WithError(err).Error("publish an event")
}
