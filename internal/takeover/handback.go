package takeover

import (
	"errors"
	"fmt"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/checkpoint"
	"cri-dockerd/internal/logs/driver"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/spec"
)

// HandBack is what the way back to an older shim takes.
type HandBack struct {
	Noted []Noted  `json:"noted"` // pods of ours for which a note is written
	Kept  int      `json:"kept"`  // pods that have one already
	Drain []Drain  `json:"drain"` // pods that must go first
	unpin []string // sandboxes whose pinned namespace an older shim would never give up
}

// Noted is a pod with what is noted for the older shim.
type Noted struct {
	Pod       string   `json:"pod"`
	Sandbox   string   `json:"sandbox"`
	HostPorts []string `json:"hostPorts,omitempty"`
	note      checkpoint.Checkpoint
}

// Drain is a pod that an older shim cannot take as it is.
type Drain struct {
	Pod     string `json:"pod"`
	Sandbox string `json:"sandbox"`
	Why     string `json:"why"`
}

func (s *survey) handBack() *HandBack {
	h := &HandBack{Noted: []Noted{}, Drain: []Drain{}}
	for _, sb := range s.sandboxes() {
		if why := s.mustGo(sb); why != "" {
			h.Drain = append(h.Drain, Drain{title(sb), string(sb.ID), clean(why)})
			continue
		}

		if sb.IsWithoutNetwork() && s.pinned[string(sb.ID)] {
			h.unpin = append(h.unpin, string(sb.ID))
		}

		switch {
		case s.notes[string(sb.ID)].file != "":
			h.Kept++
		case !sb.OwnNetNS: // of those, only dead ones are here, and their network is released
			ports := s.ports(sb)
			h.Noted = append(h.Noted, Noted{title(sb), string(sb.ID), portNames(ports), checkpoint.Checkpoint{
				Name:        sb.Metadata.GetName(),
				Namespace:   sb.Metadata.GetNamespace(),
				Ports:       ports,
				HostNetwork: sb.HostNetwork(),
			}})
		}
	}

	return h
}

// mustGo says why an older shim cannot take a pod as it is, "" if it can.
func (s *survey) mustGo(sb *spec.Sandbox) string {
	if _, connected := s.cache[string(sb.ID)]; sb.OwnNetNS && (sb.Running || connected) {
		return "its network namespace is our own; the older shim takes it for the host's and never releases its address"
	}

	for _, c := range s.containersOf(sb.ID) {
		switch {
		case c.State != runtimeapi.ContainerState_CONTAINER_RUNNING:
		case c.LogDriver == driver.Name:
			return fmt.Sprintf("container %s writes its log through the log-driver process of this release, and "+
				"stands still without it", c.Metadata.Name)
		case len(c.ImageVolumes) > 0 && !s.host.NativeImageVolumes():
			return fmt.Sprintf("container %s has an image volume, which only this daemon unmounts", c.Metadata.Name)
		}
	}

	return ""
}

// do writes the notes and gives up what only this daemon would give up later.
func (h *HandBack) do(files checkpoint.Files, pins interface{ Unpin(model.ContainerID) error }) error {
	var errs []error
	for _, n := range h.Noted {
		id, err := model.ParseContainerID(n.Sandbox)
		if err == nil {
			err = files.Write(id, n.note)
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
