package translate

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// PodLabel is a filter for Docker's list. Every container of a pod has this label, including those
// of older shims.
const PodLabel = labelType

// Read translates Docker's response to an inspect: a sandbox, a container, or an empty object for a
// container of another program. It accepts incomplete responses (a container during its removal).
// image are the labels inherited from the container's image. They are not trusted. The error is
// DataLoss if the record of a container is invalid.
func Read(in container.InspectResponse, image model.ImageLabels) (model.Object, error) {
	n, err := parseName(in.Name)
	if in.Config == nil || err != nil {
		return model.Object{}, nil //nolint:nilerr // a container of another program
	}

	if _, err := model.ParseContainerID(in.ID); err != nil {
		return model.Object{}, err
	}

	if in.State == nil {
		in.State = &container.State{}
	}
	if in.HostConfig == nil {
		in.HostConfig = &container.HostConfig{}
	}

	labels := withoutInherited(in.Config.Labels, image)
	r, err := parseRecord(labels, strings.TrimPrefix(in.Name, "/"))
	switch {
	case errors.Is(err, errNoRecord):
		return readForeign(in, n, labels), nil
	case err != nil:
		return model.Object{}, fmt.Errorf("container %s: %w", in.ID, err)
	case r.Sandbox != nil:
		return model.Object{Sandbox: readSandbox(in, n, r)}, nil
	case !in.HostConfig.NetworkMode.IsContainer() ||
		in.HostConfig.NetworkMode.ConnectedContainer() != string(r.Container.SandboxID):
		return model.Object{}, fmt.Errorf("container %s: %w", in.ID,
			invalidRecord("the container joined another sandbox"))
	}

	return model.Object{Container: readContainer(in, n, r)}, nil
}

// readForeign reads an object of an older shim, without a record. labels are the container's
// without those of its image.
func readForeign(in container.InspectResponse, n name, labels map[string]string) model.Object {
	r := &record{Name: strings.TrimPrefix(in.Name, "/")}
	switch labels[labelType] {
	case typeSandbox:
		r.Labels, r.Annotations = readSharedLabels(labels, true)
		r.Sandbox = &sandboxRecord{Pid: runtimeapi.NamespaceMode_CONTAINER.String()}
		sb := readSandbox(in, n, r)
		sb.Foreign = true
		return model.Object{Sandbox: sb}

	case typeContainer:
		sandbox, err := model.ParseContainerID(labels[labelSandboxID])
		if err != nil {
			return model.Object{}
		}
		r.Labels, r.Annotations = readSharedLabels(labels, false)
		r.Container = &containerRecord{SandboxID: sandbox, Image: in.Config.Image}
		if p := labels[labelLogPath]; path.IsAbs(p) {
			r.Container.LogPath = path.Clean(p)
		}
		return model.Object{Container: readContainer(in, n, r)}
	}

	return model.Object{}
}

func readSandbox(in container.InspectResponse, n name, r *record) *model.Sandbox {
	s := &model.Sandbox{
		ID:    model.ContainerID(in.ID),
		Name:  r.Name,
		Image: cmp.Or(r.Sandbox.Image, in.Config.Image),
		Metadata: &runtimeapi.PodSandboxMetadata{
			Name:      n.pod,
			Namespace: n.namespace,
			Uid:       n.uid,
			Attempt:   n.attempt,
		},
		Labels:         r.Labels,
		Annotations:    r.Annotations,
		RuntimeHandler: r.Sandbox.Handler,
		Namespaces:     readNamespaces(in.HostConfig, r.Sandbox),
		CreatedAt:      readTime(in.Created),
		StartedAt:      readTime(in.State.StartedAt),
		Running:        in.State.Running,
		Pid:            in.State.Pid,
		NeverStarted:   in.State.Status == container.StateCreated,
		NetworkMode:    string(in.HostConfig.NetworkMode),
		HostUsers:      in.HostConfig.UsernsMode.IsHost(),
		OwnNetNS:       r.Sandbox.OwnNetNS,
		ExitCode:       in.State.ExitCode,
		ResolvConfPath: in.ResolvConfPath,
		HostsPath:      in.HostsPath,
		CgroupParent:   in.HostConfig.CgroupParent,
		Runtime:        in.HostConfig.Runtime,
		ExecOutput:     readAnnotation(in.HostConfig).Output,
		Plugged:        readPlugged(in.HostConfig, r.Sandbox.Plugins),
		Own:            r.Sandbox.PodResources,
		EnginePorts:    readPorts(in.HostConfig.PortBindings),
		EngineIPs:      readEngineIPs(in.NetworkSettings),
	}

	finished := readTime(in.State.FinishedAt)
	if s.Running {
		// Docker keeps the time of the last exit (moby, container.State.SetRunning)
		s.Restarted = !finished.IsZero()
	} else {
		s.FinishedAt = finished
	}

	return s
}

// readEngineIPs returns the addresses on the engine's own networks.
func readEngineIPs(in *container.NetworkSettings) []netip.Addr {
	if in == nil {
		return nil
	}

	var out []netip.Addr
	for _, e := range in.Networks {
		if e == nil {
			continue
		}

		for _, ip := range []netip.Addr{e.IPAddress, e.GlobalIPv6Address} {
			if ip.IsValid() && !ip.IsUnspecified() {
				out = append(out, ip)
			}
		}
	}

	return out
}

// readPorts returns the host ports of the engine, sorted by number.
func readPorts(bindings network.PortMap) []*runtimeapi.PortMapping {
	var out []*runtimeapi.PortMapping
	for port, hosts := range bindings {
		for _, b := range hosts {
			p := &runtimeapi.PortMapping{
				Protocol:      runtimeapi.Protocol(runtimeapi.Protocol_value[strings.ToUpper(string(port.Proto()))]),
				ContainerPort: int32(port.Num()),
			}
			if n, err := strconv.ParseUint(b.HostPort, 10, 16); err == nil {
				p.HostPort = int32(n)
			}

			if b.HostIP.IsValid() && !b.HostIP.IsUnspecified() {
				p.HostIp = b.HostIP.String()
			}

			out = append(out, p)
		}
	}

	slices.SortFunc(out, func(a, b *runtimeapi.PortMapping) int {
		return cmp.Or(cmp.Compare(a.HostPort, b.HostPort), cmp.Compare(a.Protocol, b.Protocol))
	})

	return out
}

// Misfit explains why Read ignores or rejects a container with the name or the labels of a pod's
// container. It returns "" for an acceptable container and for one without any relation to pods.
// labels are those of a list and may come from an image, so the result is only a hint for people.
func Misfit(name string, labels map[string]string) string {
	kind, labelled := labels[labelType]
	_, err := parseName(name)
	_, recordErr := parseRecord(labels, strings.TrimPrefix(name, "/"))
	switch {
	case labelled && kind != typeSandbox && kind != typeContainer:
		return fmt.Sprintf("its label %s is %q, neither %s nor %s", labelType, kind, typeSandbox, typeContainer)
	case labelled && err != nil:
		return err.Error()
	case !labelled && err == nil:
		return fmt.Sprintf("it has the name of a pod's container but not the label %s", labelType)
	case labelled && recordErr != nil && !errors.Is(recordErr, errNoRecord):
		return recordErr.Error()
	}

	return ""
}

// readNamespaces restores the pod's namespace options.
func readNamespaces(h *container.HostConfig, r *sandboxRecord) *runtimeapi.NamespaceOption {
	o := &runtimeapi.NamespaceOption{
		Pid:           runtimeapi.NamespaceMode(runtimeapi.NamespaceMode_value[r.Pid]),
		UsernsOptions: r.UserNS,
	}
	if h.PidMode.IsHost() {
		o.Pid = runtimeapi.NamespaceMode_NODE
	}
	if h.NetworkMode.IsHost() && !r.OwnNetNS {
		o.Network = runtimeapi.NamespaceMode_NODE
	}
	if h.IpcMode.IsHost() {
		o.Ipc = runtimeapi.NamespaceMode_NODE
	}

	return o
}

// readTime parses a time from Docker. An unset ("0001-01-01T00:00:00Z") or invalid time is zero.
func readTime(s string) time.Time {
	t, err := time.Parse(time.RFC3339Nano, s)
	if err != nil || t.Year() <= 1 {
		return time.Time{}
	}
	return t
}
