package translate

import (
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"slices"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// labelRecord holds the record of an object as JSON: every fact without a field in Docker. Docker
// merges an image's labels into those of a container, so the author of an image can set any label
// that is not always set. This one is always set.
const labelRecord = ownPrefix + "record"

const (
	recordVersion = 1
	// maxRecord is the maximum size in bytes. Kubernetes allows 256 KiB of annotations, and JSON
	// may escape them.
	maxRecord = 1 << 20
)

// record is the content of labelRecord. One of Sandbox and Container is set.
type record struct {
	Version int `json:"v"`
	// Name is the container's name. A record is valid only for the container of this name.
	Name        string            `json:"name"`
	Labels      map[string]string `json:"labels,omitempty"`
	Annotations map[string]string `json:"annotations,omitempty"`
	Sandbox     *sandboxRecord    `json:"sandbox,omitempty"`
	Container   *containerRecord  `json:"container,omitempty"`
}

// sandboxRecord is the part of a record for a sandbox.
type sandboxRecord struct {
	Image   string `json:"image,omitempty"`   // the name of the pause image
	Handler string `json:"handler,omitempty"` // the runtime handler of the request
	// Pid is the name of the pod's PID mode. Docker knows only the modes of the pod's containers.
	Pid string `json:"pid"`
	// OwnNetNS is set if Docker's network mode "host" is not the pod's, see joinNetNS.
	OwnNetNS bool `json:"ownNetNS,omitempty"`
	// UserNS is the pod's user namespace, nil for the node's.
	UserNS *runtimeapi.UserNamespace `json:"userns,omitempty"`
	// Plugins is set if NRI plugins must see the pod.
	Plugins bool `json:"plugins,omitempty"`
	model.PodResources
}

// containerRecord is the part of a record for a container.
type containerRecord struct {
	SandboxID    model.ContainerID   `json:"sandboxID"`
	Image        string              `json:"image"`              // the image's name as requested
	ImageRef     string              `json:"imageRef,omitempty"` // its name with digest at that time
	LogPath      string              `json:"logPath,omitempty"`
	ImageVolumes []model.ImageVolume `json:"imageVolumes,omitempty"`
	Limits       model.KernelLimits  `json:"limits,omitzero"`
	User         *model.User         `json:"user,omitempty"` // nil if it was unknown
	// Plugins is set if NRI plugins must see the container.
	Plugins bool `json:"plugins,omitempty"`
}

// write returns Docker's labels: the record, and the labels for other tools. A record over
// maxRecord is InvalidArgument, and the error names the field.
func (r *record) write(facts map[string]string) (map[string]string, error) {
	r.Version = recordVersion
	text, err := json.Marshal(r)
	if err != nil {
		return nil, fmt.Errorf("config: %w: %w", err, errdefs.ErrInvalidArgument)
	}

	if len(text) > maxRecord {
		return nil, fmt.Errorf("config.labels, config.annotations: %d bytes as JSON, the maximum is %d: %w",
			len(text), maxRecord, errdefs.ErrInvalidArgument)
	}

	labels := sharedLabels(r, facts)
	labels[labelRecord] = string(text)

	return labels, nil
}

// errNoRecord means that an object has no record: an older shim created it, or another program.
var errNoRecord = errors.New("no record")

// parseRecord parses the record of the container with this name. Errors are errNoRecord or
// DataLoss.
func parseRecord(labels map[string]string, name string) (*record, error) {
	text, ok := labels[labelRecord]
	if !ok {
		return nil, errNoRecord
	}
	if len(text) > maxRecord {
		return nil, invalidRecord("it has %d bytes", len(text))
	}

	r := &record{}
	if err := json.Unmarshal([]byte(text), r); err != nil {
		return nil, invalidRecord("%v", err)
	}

	switch {
	case r.Version != recordVersion:
		return nil, invalidRecord("version %d is unknown", r.Version)
	case r.Name != name:
		return nil, invalidRecord("it belongs to another container")
	case (r.Sandbox == nil) == (r.Container == nil):
		return nil, invalidRecord("it must have one of sandbox and container")
	case r.Sandbox != nil:
		return r, r.Sandbox.check()
	}

	return r, r.Container.check()
}

func invalidRecord(format string, args ...any) error {
	return fmt.Errorf("label %s: %s: %w", labelRecord, fmt.Sprintf(format, args...), errdefs.ErrDataLoss)
}

func (s *sandboxRecord) check() error {
	if _, ok := runtimeapi.NamespaceMode_value[s.Pid]; !ok {
		return invalidRecord("PID mode %q is unknown", s.Pid)
	}
	if s.UserNS != nil && (len(s.UserNS.Uids) != 1 || len(s.UserNS.Gids) != 1) {
		return invalidRecord("the user namespace has %d and %d mappings", len(s.UserNS.Uids), len(s.UserNS.Gids))
	}
	return nil
}

func (c *containerRecord) check() error {
	if _, err := model.ParseContainerID(string(c.SandboxID)); err != nil {
		return invalidRecord("sandbox: %v", err)
	}

	if c.LogPath != "" && (!path.IsAbs(c.LogPath) || path.Clean(c.LogPath) != c.LogPath) {
		return invalidRecord("log path %q is not a clean absolute path", c.LogPath)
	}

	for _, v := range c.ImageVolumes {
		if err := checkImageVolume(v); err != nil {
			return invalidRecord("image volume: %v", err)
		}
	}

	if err := c.Limits.Check(); err != nil {
		return invalidRecord("limits: %v", err)
	}

	if c.User != nil && (c.User.UID < 0 || c.User.GID < 0 || slices.ContainsFunc(c.User.Groups, isNegative)) {
		return invalidRecord("user %+v has a negative ID", *c.User)
	}

	return nil
}

func isNegative(id int64) bool { return id < 0 }
