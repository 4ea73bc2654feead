package task

import (
	"context"

	api "github.com/containerd/containerd/api/runtime/task/v3"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"
)

// names are the names of the task service. containerd 1.7 calls the first, 2.x calls the one that
// the start step announced. Their messages are the same on the wire: the definitions differ in the
// package's name alone (containerd, api/runtime/task).
var names = []string{"containerd.task.v2.Task", "containerd.task.v3.Task"}

// RegisterTTRPC registers the service under all of its names.
func (s *Service) RegisterTTRPC(server *ttrpc.Server) error {
	for _, name := range names {
		server.RegisterService(name, &ttrpc.ServiceDesc{Methods: methods(s)})
	}
	return nil
}

// methods returns the methods of a task service by their names.
func methods(s api.TTRPCTaskService) map[string]ttrpc.Method {
	return map[string]ttrpc.Method{
		"State":      method(s.State),
		"Create":     method(s.Create),
		"Start":      method(s.Start),
		"Delete":     method(s.Delete),
		"Pids":       method(s.Pids),
		"Pause":      method(s.Pause),
		"Resume":     method(s.Resume),
		"Checkpoint": method(s.Checkpoint),
		"Kill":       method(s.Kill),
		"Exec":       method(s.Exec),
		"ResizePty":  method(s.ResizePty),
		"CloseIO":    method(s.CloseIO),
		"Update":     method(s.Update),
		"Wait":       method(s.Wait),
		"Stats":      method(s.Stats),
		"Connect":    method(s.Connect),
		"Shutdown":   method(s.Shutdown),
	}
}

// message is a pointer to a message of type T.
type message[T any] interface {
	*T
	proto.Message
}

// method returns the handler of a method.
func method[T, R any, M message[T]](call func(context.Context, M) (R, error)) ttrpc.Method {
	return func(ctx context.Context, unmarshal func(any) error) (any, error) {
		request := M(new(T))
		if err := unmarshal(request); err != nil {
			return nil, err
		}
		return call(ctx, request)
	}
}
