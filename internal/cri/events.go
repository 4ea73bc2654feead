package cri

import (
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/view"
)

// GetContainerEvents tells every transition of containers and sandboxes from now on, each once and
// in order, also those that happened while the engine was away (CRI GetContainerEvents, KEP-3386).
// The answer's header is sent when nothing can be missed any more. The stream ends with
// ResourceExhausted when its reader is too slow, and with Unavailable when the daemon stops; the
// kubelet then lists and connects anew.
func (s *Service) GetContainerEvents(
	_ *runtimeapi.GetEventsRequest, out runtimeapi.RuntimeService_GetContainerEventsServer,
) error {
	w := s.View.Watch()
	defer w.Stop()

	if err := out.SendHeader(nil); err != nil {
		return err
	}

	for {
		c, err := w.Next(out.Context())
		if err != nil {
			return err
		}
		if err := out.Send(newEvent(c, s.Network)); err != nil {
			return err
		}
	}
}

// newEvent returns a change in the CRI's terms, with the pod's addresses as they are now.
func newEvent(c *view.Change, network Network) *runtimeapi.ContainerEventResponse {
	e := &runtimeapi.ContainerEventResponse{
		ContainerId:        string(c.ID),
		ContainerEventType: c.Type,
		CreatedAt:          c.At.UnixNano(),
		ContainersStatuses: statuses(c.Containers),
	}
	if c.Sandbox != nil {
		e.PodSandboxStatus = c.Sandbox.Status(network.Addresses(c.Sandbox))
	}

	return e
}
