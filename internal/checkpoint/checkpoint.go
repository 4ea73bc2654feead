// Package checkpoint reads and writes the sandbox checkpoints of older Docker shims. These are
// files <root directory>/sandbox/<sandbox ID> with the data to tear a sandbox down. The daemon
// reads them to adopt pods of older shims, and `cri-dockerd takeover` writes them to hand pods
// back. They are never a source of truth for our own pods.
package checkpoint

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/safefs"
	"cri-dockerd/internal/text"
)

// Dockershim is the root directory of the kubelet's own shim, up to Kubernetes 1.23.
const Dockershim = "/var/lib/dockershim"

// Checkpoint is the content of a checkpoint file.
type Checkpoint struct {
	Name        string // of the pod
	Namespace   string
	Ports       []*runtimeapi.PortMapping
	HostNetwork bool
}

// file is the file format, version "v1". The checksum depends on the shim's Go types and cannot be
// computed here.
type file struct {
	Version   string `json:"version"`
	Name      string `json:"name"`
	Namespace string `json:"namespace"`
	Data      data   `json:"data"`
	Checksum  uint64 `json:"checksum"`
}

type data struct {
	Ports       []port `json:"port_mappings,omitempty"`
	HostNetwork bool   `json:"host_network,omitempty"`
}

type port struct {
	Protocol      string `json:"protocol"`
	ContainerPort int32  `json:"container_port"`
	HostPort      int32  `json:"host_port"`
	HostIP        string `json:"host_ip"`
}

// Files provides the checkpoints below the root directories of shims.
type Files struct{ roots []string }

// New returns the checkpoints below these root directories, which need not exist. Write uses the
// first one.
func New(roots ...string) Files { return Files{roots} }

// Limits of older shims' checkpoints. A pod has about ten ports.
const (
	maxFile  = 1 << 20 // bytes
	maxPorts = 4096
	maxFiles = 1 << 16 // file names read per directory
	maxName  = 253     // bytes of a Kubernetes name (RFC 1123 subdomain)
)

// directory returns the directory of checkpoints below a root directory.
func directory(root string) string { return filepath.Join(root, "sandbox") }

// Path returns the path of a sandbox's checkpoint, "" if there is none.
func (f Files) Path(id model.ContainerID) string {
	if id == "" {
		return ""
	}

	for _, root := range f.roots {
		p := filepath.Join(directory(root), string(id))
		if st, err := os.Lstat(p); err == nil && st.Mode().IsRegular() {
			return p
		}
	}

	return ""
}

// Read returns the checkpoint of a sandbox. It returns NotFound if there is none, and DataLoss if
// it is unreadable.
func (f Files) Read(id model.ContainerID) (Checkpoint, error) {
	p := f.Path(id)
	if p == "" {
		return Checkpoint{}, fmt.Errorf("checkpoint of sandbox %s: %w", id, errdefs.ErrNotFound)
	}

	b, err := safefs.ReadFile(p, maxFile)
	if errors.Is(err, os.ErrNotExist) {
		return Checkpoint{}, fmt.Errorf("checkpoint of sandbox %s: %w", id, errdefs.ErrNotFound)
	}

	var c Checkpoint
	if err == nil {
		c, err = parse(b)
	}

	if err != nil {
		return Checkpoint{}, fmt.Errorf("checkpoint %s: %w: %w", p, err, errdefs.ErrDataLoss)
	}

	return c, nil
}

// parse parses a file and checks all fields in use. Errors contain the field's name.
func parse(b []byte) (Checkpoint, error) {
	var c file
	if err := json.Unmarshal(b, &c); err != nil {
		return Checkpoint{}, errors.New(text.Clean(err.Error(), text.MaxName))
	}

	if !isName(c.Name) {
		return Checkpoint{}, fmt.Errorf("name %q is not a valid pod name", text.Clean(c.Name, maxName))
	}
	if !isName(c.Namespace) {
		return Checkpoint{}, fmt.Errorf("namespace %q is not a valid namespace name", text.Clean(c.Namespace, maxName))
	}
	if len(c.Data.Ports) > maxPorts {
		return Checkpoint{}, fmt.Errorf("port_mappings: %d exceed the limit of %d", len(c.Data.Ports), maxPorts)
	}

	out := Checkpoint{
		Name:        c.Name,
		Namespace:   c.Namespace,
		HostNetwork: c.Data.HostNetwork,
	}

	for i, m := range c.Data.Ports {
		p, err := m.parse()
		if err != nil {
			return Checkpoint{}, fmt.Errorf("port_mappings[%d].%w", i, err)
		}
		out.Ports = append(out.Ports, p)
	}

	return out, nil
}

// isName accepts valid names of pods and namespaces. They become arguments of CNI plugins.
func isName(s string) bool {
	for i, c := range []byte(s) {
		isAlnum := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !isAlnum && (i == 0 || c != '.' && c != '-') {
			return false
		}
	}
	return len(s) <= maxName
}

// parse checks a port. Older shims wrote 0 for an unmapped container port. The default protocol is
// TCP.
func (m port) parse() (*runtimeapi.PortMapping, error) {
	const maxPort = 1<<16 - 1
	if m.ContainerPort < 0 || m.ContainerPort > maxPort {
		return nil, fmt.Errorf("container_port: %d is not a port", m.ContainerPort)
	}
	if m.HostPort < 0 || m.HostPort > maxPort {
		return nil, fmt.Errorf("host_port: %d is not a port", m.HostPort)
	}

	protocol, known := runtimeapi.Protocol_value[strings.ToUpper(cmp.Or(m.Protocol, "tcp"))]
	if !known {
		return nil, fmt.Errorf("protocol: %q is not a protocol", text.Clean(m.Protocol, maxName))
	}
	if a, err := netip.ParseAddr(m.HostIP); m.HostIP != "" && (err != nil || a.Zone() != "") {
		return nil, fmt.Errorf("host_ip: %q is not an IP address", text.Clean(m.HostIP, maxName))
	}

	return &runtimeapi.PortMapping{
		Protocol:      runtimeapi.Protocol(protocol),
		ContainerPort: m.ContainerPort,
		HostPort:      m.HostPort,
		HostIp:        m.HostIP,
	}, nil
}

// List returns the sorted IDs of all sandboxes with a checkpoint.
func (f Files) List() []model.ContainerID {
	var ids []model.ContainerID
	for _, root := range f.roots {
		dir, err := safefs.OpenDir(directory(root))
		if err != nil {
			continue // not used by any shim
		}

		entries, _ := dir.ReadDir(maxFiles)
		dir.Close()
		for _, e := range entries {
			if id, err := model.ParseContainerID(e.Name()); err == nil && e.Type().IsRegular() {
				ids = append(ids, id)
			}
		}
	}

	slices.Sort(ids)

	return slices.Compact(ids)
}

// Remove removes the checkpoints of a sandbox. It is idempotent.
func (f Files) Remove(id model.ContainerID) error {
	if id == "" {
		return nil
	}

	var errs []error
	for _, root := range f.roots {
		file := filepath.Join(directory(root), string(id))
		if st, err := os.Lstat(file); err == nil && st.IsDir() {
			continue // not a checkpoint, see Path; it must not block the removal of a pod
		}
		if err := os.Remove(file); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, fmt.Errorf("remove checkpoint of an older shim: %w", err))
		}
	}

	return errors.Join(errs...)
}

// Write writes the checkpoint of a sandbox atomically. It returns InvalidArgument for content
// invalid in Read.
func (f Files) Write(id model.ContainerID, c Checkpoint) error {
	if id == "" {
		return fmt.Errorf("write checkpoint: sandbox ID is empty: %w", errdefs.ErrInvalidArgument)
	}

	out := file{
		Version:   "v1",
		Name:      c.Name,
		Namespace: c.Namespace,
		Data:      data{HostNetwork: c.HostNetwork},
	}

	for _, m := range c.Ports {
		out.Data.Ports = append(out.Data.Ports, port{
			Protocol:      strings.ToLower(m.GetProtocol().String()),
			ContainerPort: m.GetContainerPort(),
			HostPort:      m.GetHostPort(),
			HostIP:        m.GetHostIp(),
		})
	}

	b, err := json.Marshal(out)
	if err != nil {
		return fmt.Errorf("write checkpoint of sandbox %s: %w", id, err)
	}

	if _, err := parse(b); err != nil {
		return fmt.Errorf("write checkpoint of sandbox %s: %w: %w", id, err, errdefs.ErrInvalidArgument)
	}

	if err := replace(directory(f.roots[0]), string(id), b); err != nil {
		return fmt.Errorf("write checkpoint of sandbox %s: %w", id, err)
	}

	return nil
}

// replace writes a temporary file and renames it, so that the file is complete or absent.
func replace(dir, name string, b []byte) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	temporary := filepath.Join(dir, ".new-") // not a sandbox ID, in case of a crash
	return safefs.WriteFile(filepath.Join(dir, name), temporary, b, (*os.File).Sync)
}
