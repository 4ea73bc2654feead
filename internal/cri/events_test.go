package cri

import (
	"context"
	"errors"
	"testing"
	"time"

	"google.golang.org/grpc/metadata"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// eventStream receives the events of GetContainerEvents.
type eventStream struct {
	runtimeapi.RuntimeService_GetContainerEventsServer
	ctx    context.Context //nolint:containedctx // like gRPC's streams
	opened chan struct{}   // the header was sent
	events chan *runtimeapi.ContainerEventResponse
	refuse error
}

func (s *eventStream) Context() context.Context     { return s.ctx }
func (s *eventStream) SendHeader(metadata.MD) error { close(s.opened); return nil }
func (s *eventStream) next(t *testing.T) *runtimeapi.ContainerEventResponse {
	t.Helper()
	select {
	case e := <-s.events:
		return e
	case <-time.After(10 * time.Second):
		t.Fatal("no event within 10 s")
		return nil
	}
}

func (s *eventStream) Send(e *runtimeapi.ContainerEventResponse) error {
	if s.refuse == nil {
		s.events <- e
	}
	return s.refuse
}

// watchEvents opens a stream. stop ends it and returns its error.
func watchEvents(t *testing.T, s *Service) (stream *eventStream, stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	stream = &eventStream{
		ctx:    ctx,
		opened: make(chan struct{}),
		events: make(chan *runtimeapi.ContainerEventResponse, 100),
	}

	ended := make(chan error, 1)
	go func() { ended <- s.GetContainerEvents(&runtimeapi.GetEventsRequest{}, stream) }()
	<-stream.opened

	return stream, func() error { cancel(); return <-ended }
}

func TestGetContainerEvents(t *testing.T) {
	s, w := newService(t)
	stream, stop := watchEvents(t, s)
	other, stopOther := watchEvents(t, s)
	cfg := w.pod()
	pod := runPod(t, s, cfg)
	is := func(id string, kind runtimeapi.ContainerEventType) *runtimeapi.ContainerEventResponse {
		t.Helper()
		e := stream.next(t)
		if e.ContainerId != id || e.ContainerEventType != kind ||
			e.PodSandboxStatus.GetMetadata().GetUid() != cfg.Metadata.Uid || e.PodSandboxStatus.Id != pod {
			t.Fatalf("want %s of %s, got %+v", kind, id, e)
		}

		if twin := other.next(t); twin.ContainerId != id || twin.ContainerEventType != kind ||
			twin.CreatedAt != e.CreatedAt {
			t.Fatalf("another client received %+v, want %+v", twin, e)
		}

		return e
	}

	is(pod, runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT)
	e := is(pod, runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT)
	if e.PodSandboxStatus.State != runtimeapi.PodSandboxState_SANDBOX_READY {
		t.Errorf("event: %+v", e)
	}

	ctr := started(t, s, createRequest(pod, cfg))
	if e := is(ctr, runtimeapi.ContainerEventType_CONTAINER_CREATED_EVENT); len(e.ContainersStatuses) != 1 ||
		e.PodSandboxStatus.Network.Ip == "" {
		t.Errorf("event: %+v", e)
	}

	is(ctr, runtimeapi.ContainerEventType_CONTAINER_STARTED_EVENT)
	w.engine.End(model.ContainerID(ctr), 5)
	e = is(ctr, runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT)
	if c := e.ContainersStatuses[0]; c.ExitCode != 5 || c.State != runtimeapi.ContainerState_CONTAINER_EXITED ||
		c.FinishedAt != e.CreatedAt {
		t.Errorf("event: %+v", e)
	}

	status, err := s.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: pod})
	if err != nil || status.Timestamp <= e.CreatedAt {
		t.Errorf("a status after the event has timestamp %d, the event %d: %v", status.GetTimestamp(), e.CreatedAt, err)
	}

	if _, err := s.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: pod}); err != nil {
		t.Fatal(err)
	}

	is(pod, runtimeapi.ContainerEventType_CONTAINER_STOPPED_EVENT)
	is(ctr, runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT)
	if e := is(pod, runtimeapi.ContainerEventType_CONTAINER_DELETED_EVENT); len(e.ContainersStatuses) != 0 ||
		e.CreatedAt <= status.Timestamp {
		t.Errorf("event: %+v", e)
	}

	if err := errors.Join(stop(), stopOther()); !errors.Is(err, context.Canceled) {
		t.Errorf("after the client has disconnected: %v", err)
	}
}

// TestEventsOfBrokenStream: an error of the stream ends the call.
func TestEventsOfBrokenStream(t *testing.T) {
	s, w := newService(t)
	boom := errors.New("the client has disconnected")
	stream := &eventStream{ctx: t.Context(), opened: make(chan struct{}), refuse: boom}
	ended := make(chan error, 1)
	go func() { ended <- s.GetContainerEvents(&runtimeapi.GetEventsRequest{}, stream) }()
	<-stream.opened
	runPod(t, s, w.pod())
	if err := <-ended; !errors.Is(err, boom) {
		t.Error(err)
	}
}
