// Package checkpoint is the file that older Docker shims keep for every sandbox, <root directory>/sandbox/<sandbox ID>: what they need to
// tear it down. It is read to adopt their pods, written to hand ours back, and never a source of truth of our own.
package checkpoint

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Dockershim is the root directory of the kubelet's own shim, up to Kubernetes 1.23.
const Dockershim = "/var/lib/dockershim"

// Checkpoint is what a file says of its sandbox.
type Checkpoint struct {
	Name        string // of the pod
	Namespace   string
	Ports       []*runtimeapi.PortMapping
	HostNetwork bool
}

// file is the format, version "v1". The checksum is over the shim's Go types and cannot be known here.
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

// Files are the checkpoints below the root directories of shims.
type Files struct{ roots []string }

// New returns the checkpoints below these root directories; they need not exist. Write writes below the first.
func New(roots ...string) Files { return Files{roots} }

// path is where a root directory has the checkpoint of a sandbox, false for what is not a sandbox ID.
func path(root, id string) (string, bool) {
	if id == "" || strings.Trim(id, "0123456789abcdef") != "" { // Docker's IDs are hex digits
		return "", false
	}
	return filepath.Join(root, "sandbox", id), true
}

// Path is where the checkpoint of a sandbox lies, "" if there is none.
func (f Files) Path(id string) string {
	for _, root := range f.roots {
		p, ok := path(root, id)
		if !ok {
			return ""
		}
		if st, err := os.Lstat(p); err == nil && st.Mode().IsRegular() {
			return p
		}
	}
	return ""
}

// Read is the checkpoint of a sandbox. NotFound if there is none, DataLoss if it cannot be read.
func (f Files) Read(id string) (Checkpoint, error) {
	p := f.Path(id)
	if p == "" {
		return Checkpoint{}, fmt.Errorf("checkpoint of sandbox %s: %w", id, errdefs.ErrNotFound)
	}
	b, err := os.ReadFile(p)
	if errors.Is(err, os.ErrNotExist) {
		return Checkpoint{}, fmt.Errorf("checkpoint of sandbox %s: %w", id, errdefs.ErrNotFound)
	}
	var c file
	if err == nil {
		err = json.Unmarshal(b, &c)
	}
	if err != nil {
		return Checkpoint{}, fmt.Errorf("checkpoint %s: %w: %w", p, err, errdefs.ErrDataLoss)
	}
	out := Checkpoint{Name: c.Name, Namespace: c.Namespace, HostNetwork: c.Data.HostNetwork}
	for _, m := range c.Data.Ports {
		out.Ports = append(out.Ports, &runtimeapi.PortMapping{
			Protocol:      runtimeapi.Protocol(runtimeapi.Protocol_value[strings.ToUpper(m.Protocol)]), // TCP if it says nothing that is known
			ContainerPort: m.ContainerPort, HostPort: m.HostPort, HostIp: m.HostIP,
		})
	}
	return out, nil
}

// List are the IDs of all sandboxes with a checkpoint, sorted.
func (f Files) List() []string {
	var ids []string
	for _, root := range f.roots {
		entries, err := os.ReadDir(filepath.Join(root, "sandbox"))
		if err != nil {
			continue // no shim has been here
		}
		for _, e := range entries {
			if _, ok := path(root, e.Name()); ok && e.Type().IsRegular() {
				ids = append(ids, e.Name())
			}
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}

// Remove removes the checkpoints of a sandbox; none is no error.
func (f Files) Remove(id string) error {
	var errs []error
	for _, root := range f.roots {
		if p, ok := path(root, id); ok {
			if err := os.Remove(p); err != nil && !errors.Is(err, os.ErrNotExist) {
				errs = append(errs, fmt.Errorf("remove the checkpoint of a shim before this one: %w", err))
			}
		}
	}
	return errors.Join(errs...)
}

// Write writes the checkpoint of a sandbox, whole or not at all.
func (f Files) Write(id string, c Checkpoint) error {
	p, ok := path(f.roots[0], id)
	if !ok {
		return fmt.Errorf("write checkpoint: %q is not a sandbox ID: %w", id, errdefs.ErrInvalidArgument)
	}
	out := file{Version: "v1", Name: c.Name, Namespace: c.Namespace, Data: data{HostNetwork: c.HostNetwork}}
	for _, m := range c.Ports {
		out.Data.Ports = append(out.Data.Ports, port{strings.ToLower(m.GetProtocol().String()), m.GetContainerPort(), m.GetHostPort(), m.GetHostIp()})
	}
	b, err := json.Marshal(out)
	if err == nil {
		err = os.MkdirAll(filepath.Dir(p), 0o755)
	}
	tmp := filepath.Join(filepath.Dir(p), "."+id) // is no sandbox ID, if a crash leaves it
	if err == nil {
		err = os.WriteFile(tmp, b, 0o600)
	}
	if err == nil {
		err = os.Rename(tmp, p)
	}
	if err != nil {
		return fmt.Errorf("write the checkpoint of sandbox %s: %w", id, err)
	}
	return nil
}
