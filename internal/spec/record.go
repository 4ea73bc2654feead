package spec

import (
	"encoding/json"
	"errors"
	"fmt"
	"path"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// labelRecord holds the whole record of an object as JSON: everything that the daemon reads back
// and that Docker has no field for. Docker merges an image's labels into those of a container, so a
// label that is set only sometimes can be set by the image's author. This one is always set.
const labelRecord = ownMark + "record"

const (
	recordVersion = 1
	// bytes; Kubernetes allows 256 KiB of annotations, which JSON may escape
	maxRecord = 1 << 20
)

// record is what stands in labelRecord. One of Sandbox and Container is set.
type record struct {
	Version int `json:"v"`
	// Name is the container's name. A record is valid for the container that has it only.
	Name        string            `json:"name"`
	Labels      map[string]string `json:"labels,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
	Sandbox     *sandboxRecord    `json:"sandbox,omitempty"`
	Container   *containerRecord  `json:"container,omitempty"`
}

// sandboxRecord is the part of a sandbox.
type sandboxRecord struct {
	Image   string `json:"image,omitempty"`   // the name of the pause image
	Handler string `json:"handler,omitempty"` // the runtime handler of the request
	// Pid is the name of the pod's PID mode. Docker knows that of its containers only.
	Pid string `json:"pid"`
	// OwnNetNS says that Docker's network mode "host" is not the pod's; see joinNetNS.
	OwnNetNS bool `json:"ownNetNS,omitempty"`
	PodResources
}

// containerRecord is the part of a container.
type containerRecord struct {
	SandboxID    model.ContainerID `json:"sandboxID"`
	Image        string            `json:"image"`              // the image's name as requested
	ImageRef     string            `json:"imageRef,omitempty"` // its name with digest at that time
	LogPath      string            `json:"logPath,omitempty"`
	ImageVolumes []ImageVolume     `json:"imageVolumes,omitempty"`
	Limits       KernelLimits      `json:"limits,omitzero"`
}

// write puts the record and the labels that others read into Docker's labels. A record over
// maxRecord is InvalidArgument and names the field.
func (r *record) write(facts map[string]string) (map[string]string, error) {
	r.Version = recordVersion
	text, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("config: %w: %w", err, errdefs.ErrInvalidArgument)
	}

	if len(text) > maxRecord {
		return nil, fmt.Errorf("config.labels, config.annotations: %d bytes as JSON, at most %d are possible: %w",
			len(text), maxRecord, errdefs.ErrInvalidArgument)
	}

	labels := sharedLabels(r, facts)
	labels[labelRecord] = string(text)

	return labels, nil
}

// errNoRecord says that an object has no record: an older shim made it, or nobody of ours did.
var errNoRecord = errors.New("no record")

// parseRecord reads the record of the container with this name. Errors are errNoRecord, or DataLoss
// with what is wrong.
func parseRecord(labels map[string]string, name string) (*record, error) {
	text, ok := labels[labelRecord]
	if !ok {
		return nil, errNoRecord
	}
	if len(text) > maxRecord {
		return nil, spoiled("it has %d bytes", len(text))
	}

	r := &record{}
	if err := json.Unmarshal([]byte(text), r); err != nil {
		return nil, spoiled("%v", err)
	}

	switch {
	case r.Version != recordVersion:
		return nil, spoiled("version %d is unknown", r.Version)
	case r.Name != name:
		return nil, spoiled("it was written for another container")
	case (r.Sandbox == nil) == (r.Container == nil):
		return nil, spoiled("it is neither a sandbox's nor a container's")
	case r.Sandbox != nil:
		return r, r.Sandbox.check()
	}

	return r, r.Container.check()
}

func spoiled(format string, args ...any) error {
	return fmt.Errorf("label %s: %s: %w", labelRecord, fmt.Sprintf(format, args...), errdefs.ErrDataLoss)
}

func (s *sandboxRecord) check() error {
	if _, ok := runtimeapi.NamespaceMode_value[s.Pid]; !ok {
		return spoiled("PID mode %q is unknown", s.Pid)
	}
	return nil
}

func (c *containerRecord) check() error {
	if _, err := model.ParseContainerID(string(c.SandboxID)); err != nil {
		return spoiled("sandbox: %v", err)
	}

	if c.LogPath != "" && (!path.IsAbs(c.LogPath) || path.Clean(c.LogPath) != c.LogPath) {
		return spoiled("log path %q is not a clean absolute path", c.LogPath)
	}

	for _, v := range c.ImageVolumes {
		if err := v.check(); err != nil {
			return spoiled("image volume: %v", err)
		}
	}

	for size := range c.Limits.Hugepages {
		if _, err := model.ParsePageSize(string(size)); err != nil {
			return spoiled("limits: %v", err)
		}
	}

	for key := range c.Limits.Unified {
		if _, err := model.ParseUnifiedKey(string(key)); err != nil {
			return spoiled("limits: %v", err)
		}
	}

	return nil
}
