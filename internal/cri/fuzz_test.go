package cri

import (
	"context"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/validate"
)

// rpc is one unary method of the Service.
type rpc struct {
	name string
	call reflect.Value
	req  reflect.Type // type of the message, without pointer
}

// rpcs returns all unary methods of both services.
func rpcs(s *Service) []rpc {
	var out []rpc
	message := reflect.TypeFor[proto.Message]()
	v := reflect.ValueOf(s)
	for i := range v.NumMethod() {
		m := v.Method(i).Type()
		if m.NumIn() == 2 && m.NumOut() == 2 && m.In(0) == reflect.TypeFor[context.Context]() &&
			m.In(1).Implements(message) {
			out = append(out, rpc{v.Type().Method(i).Name, v.Method(i), m.In(1).Elem()})
		}
	}

	return out
}

func (r rpc) do(t testing.TB, req reflect.Value) error {
	t.Helper()
	defer func() {
		if p := recover(); p != nil {
			t.Fatalf("%s(%v) panicked: %v", r.name, req, p)
		}
	}()

	if err := validate.Request(req.Interface()); err != nil {
		return err // as the interceptor of package rpc
	}

	out := r.call.Call([]reflect.Value{reflect.ValueOf(t.Context()), req})
	err, _ := out[1].Interface().(error)
	if err == nil && out[0].IsNil() {
		t.Errorf("%s(%v) returned nothing", r.name, req)
	}

	return err
}

// emptyIsFine lists the methods with a valid empty request.
var emptyIsFine = []string{
	"Version", "Status", "RuntimeConfig", "UpdateRuntimeConfig", "ListPodSandbox", "ListContainers", "ListImages",
	"ImageFsInfo", "ListContainerStats", "ListPodSandboxStats",
	"ListMetricDescriptors", "ListPodSandboxMetrics",
}

// TestEveryRPCRejectsEmptyRequests: nil and empty requests never panic, and errors name the missing
// field.
func TestEveryRPCRejectsEmptyRequests(t *testing.T) {
	s, w := newService(t)
	all := rpcs(s)
	if len(all) < 30 {
		t.Fatalf("only %d methods found", len(all))
	}

	for _, r := range all {
		t.Run(r.name, func(t *testing.T) {
			for what, req := range map[string]reflect.Value{
				"nil":   reflect.Zero(reflect.PointerTo(r.req)),
				"empty": reflect.New(r.req),
			} {
				err := r.do(t, req)
				switch {
				case slices.Contains(emptyIsFine, r.name):
					if err != nil {
						t.Errorf("%s(%s): %v", r.name, what, err)
					}

				case status.Code(err) == codes.Unimplemented:
					if !strings.Contains(err.Error(), r.name) {
						t.Errorf("%s(%s) error lacks the method's name: %v", r.name, what, err)
					}

				case !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "must"):
					t.Errorf("%s(%s): %v", r.name, what, err)
				}
			}
		})
	}

	w.assertNoLeftovers(t, s)
}

// FuzzEveryRPC calls every method with messages of arbitrary bytes. None may panic.
func FuzzEveryRPC(f *testing.F) {
	s, w := newService(f)
	all := rpcs(s)
	cfg := w.pod()
	seeds := []proto.Message{
		&runtimeapi.RunPodSandboxRequest{Config: cfg}, createRequest(strings.Repeat("a", 64), cfg),
		&runtimeapi.ExecSyncRequest{ContainerId: "x", Cmd: []string{"true"}, Timeout: 1},
		&runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{Id: "x"}},
		&runtimeapi.PullImageRequest{Image: &runtimeapi.ImageSpec{Image: "app:1"}},
		&runtimeapi.UpdateContainerResourcesRequest{ContainerId: "x"},
	}

	for i := range all {
		for _, m := range seeds {
			b, err := proto.Marshal(m)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(byte(i), b)
		}

		f.Add(byte(i), []byte{0x0a, 0x00})
		f.Add(byte(i), []byte{0x0a, 0x04, 0x0a, 0x02, 0xff, 0xfe})
	}

	f.Fuzz(func(t *testing.T, which byte, b []byte) {
		r := all[int(which)%len(all)]
		req := reflect.New(r.req)
		if proto.Unmarshal(b, req.Interface().(proto.Message)) != nil {
			return
		}
		_ = r.do(t, req)
	})
}
