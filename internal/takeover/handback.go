package takeover

import (
	"errors"
	"fmt"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/checkpoint"
	"cri-dockerd/internal/logs/driver"
	"cri-dockerd/internal/model"
)

// HandBack is a plan for the hand-back of a node to an older shim.
type HandBack struct {
	Written  []Written `json:"written"`  // our pods for which a checkpoint is written
	Existing int       `json:"existing"` // pods with an existing checkpoint
	Drain    []Drain   `json:"drain"`    // pods to be drained first
	unpin    []string  // sandboxes with a pinned namespace, which an older shim would never release
}

// Written is a pod and its new checkpoint for the older shim.
type Written struct {
	Pod        string   `json:"pod"`
	Sandbox    string   `json:"sandbox"`
	HostPorts  []string `json:"hostPorts,omitempty"`
	checkpoint checkpoint.Checkpoint
}

// Drain is a pod unsupported by older shims in its present state.
type Drain struct {
	Pod     string `json:"pod"`
	Sandbox string `json:"sandbox"`
	Reason  string `json:"reason"`
}

func (s *survey) handBack() *HandBack {
	h := &HandBack{Written: []Written{}, Drain: []Drain{}}
	for _, sb := range s.sandboxes() {
		if reason := s.drainReason(sb); reason != "" {
			h.Drain = append(h.Drain, Drain{title(sb), string(sb.ID), clean(reason)})
			continue
		}

		if sb.IsWithoutNetwork() && s.pinned[string(sb.ID)] {
			h.unpin = append(h.unpin, string(sb.ID))
		}

		switch {
		case s.checkpoints[string(sb.ID)].file != "":
			h.Existing++
		case !sb.OwnNetNS: // pods with their own namespace are stopped here, and their network is released
			ports := s.ports(sb)
			h.Written = append(h.Written, Written{
				Pod:       title(sb),
				Sandbox:   string(sb.ID),
				HostPorts: portNames(ports),
				checkpoint: checkpoint.Checkpoint{
					Name:        sb.Metadata.GetName(),
					Namespace:   sb.Metadata.GetNamespace(),
					Ports:       ports,
					HostNetwork: sb.HostNetwork(),
				},
			})
		}
	}

	return h
}

// drainReason returns why an older shim cannot take over a pod, "" if it can.
func (s *survey) drainReason(sb *model.Sandbox) string {
	if _, connected := s.cache[string(sb.ID)]; sb.OwnNetNS && (sb.Running || connected) {
		return "its network namespace was created by this daemon; an older shim treats it as the host network " +
			"and never releases the address"
	}

	for _, c := range s.containersOf(sb.ID) {
		switch {
		case c.State != runtimeapi.ContainerState_CONTAINER_RUNNING:
		case c.LogDriver == driver.Name:
			return fmt.Sprintf("container %s logs through the log-driver process of this release and blocks without it",
				c.Metadata.Name)
		case len(c.ImageVolumes) > 0 && !s.host.NativeImageVolumes():
			return fmt.Sprintf("container %s has an image volume; only this daemon unmounts it", c.Metadata.Name)
		}
	}

	return ""
}

// apply writes the checkpoints and releases the pins, which only this daemon would release.
func (h *HandBack) apply(files checkpoint.Files, pins interface{ Unpin(model.ContainerID) error }) error {
	var errs []error
	for _, n := range h.Written {
		id, err := model.ParseContainerID(n.Sandbox)
		if err == nil {
			err = files.Write(id, n.checkpoint)
		}
		errs = append(errs, err)
	}

	for _, id := range h.unpin {
		errs = append(errs, pins.Unpin(model.ContainerID(id))) // is the name of a pin
	}

	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("hand back: %w", err)
	}

	return nil
}
