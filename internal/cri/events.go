package cri

import (
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/view"
)

// GetContainerEvents streams every transition of containers and sandboxes from now on, each once
// and in order, including transitions during an outage of the engine (CRI GetContainerEvents,
// KEP-3386). It sends the response header once no later transition can be missed. The stream ends
// with ResourceExhausted if the client reads too slowly, and with Unavailable if the daemon stops;
// the kubelet then relists and reconnects.
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
		if err := out.Send(newEvent(c, s.Network, s.Engine)); err != nil {
			return err
		}
	}
}

// newEvent converts a change to a CRI event with the pod's current addresses and limits.
func newEvent(c *view.Change, network Network, e Engine) *runtimeapi.ContainerEventResponse {
	event := &runtimeapi.ContainerEventResponse{
		ContainerId:        string(c.ID),
		ContainerEventType: c.Type,
		CreatedAt:          c.At.UnixNano(),
		ContainersStatuses: containerStatuses(c.Containers, e),
	}
	if c.Sandbox != nil {
		event.PodSandboxStatus = c.Sandbox.Status(network.Addresses(c.Sandbox))
	}

	return event
}
