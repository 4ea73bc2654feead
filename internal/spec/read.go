package spec

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
	"unicode/utf8"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/image"
	"github.com/moby/moby/api/types/mount"
	"github.com/moby/moby/api/types/network"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/text"
)

// The reasons of an ended container that the kubelet and its users know.
const (
	reasonCompleted = "Completed"
	ReasonError     = "Error"
	reasonOOM       = "OOMKilled"
	reasonCannotRun = "ContainerCannotRun"
)

// OurLabel is a filter for Docker's list: every container of ours, and of the shims before, has it.
const OurLabel = labelType

// Read translates Docker's answer to an inspect: a sandbox, a container, or nothing for what is not
// ours. It accepts incomplete answers (a container that is being removed). image are the labels
// that the container's image brings; nothing is believed of them. The error is DataLoss for a
// container of ours whose record cannot be read.
func Read(in container.InspectResponse, image ImageLabels) (Object, error) {
	n, err := parseName(in.Name)
	if in.Config == nil || err != nil {
		return Object{}, nil //nolint:nilerr // another name is somebody else's container
	}

	if _, err := model.ParseContainerID(in.ID); err != nil {
		return Object{}, err
	}

	if in.State == nil {
		in.State = &container.State{}
	}
	if in.HostConfig == nil {
		in.HostConfig = &container.HostConfig{}
	}

	labels := image.without(in.Config.Labels)
	r, err := parseRecord(labels, strings.TrimPrefix(in.Name, "/"))
	switch {
	case errors.Is(err, errNoRecord):
		return readForeign(in, n, labels), nil
	case err != nil:
		return Object{}, fmt.Errorf("container %s: %w", in.ID, err)
	case r.Sandbox != nil:
		return Object{Sandbox: readSandbox(in, n, r)}, nil
	case !in.HostConfig.NetworkMode.IsContainer() ||
		in.HostConfig.NetworkMode.ConnectedContainer() != string(r.Container.SandboxID):
		return Object{}, fmt.Errorf("container %s: %w", in.ID,
			spoiled("its sandbox is not the one that the container joined"))
	}

	return Object{Container: readContainer(in, n, r)}, nil
}

// readForeign reads an object of an older shim, which has no record. labels are the container's
// without those of its image.
func readForeign(in container.InspectResponse, n name, labels map[string]string) Object {
	r := &record{Name: strings.TrimPrefix(in.Name, "/")}
	switch labels[labelType] {
	case typeSandbox:
		r.Labels, r.Annotations = readSharedLabels(labels, true)
		r.Sandbox = &sandboxRecord{Pid: runtimeapi.NamespaceMode_CONTAINER.String()}
		sb := readSandbox(in, n, r)
		sb.Foreign = true
		return Object{Sandbox: sb}

	case typeContainer:
		sandbox, err := model.ParseContainerID(labels[labelSandboxID])
		if err != nil {
			return Object{}
		}
		r.Labels, r.Annotations = readSharedLabels(labels, false)
		r.Container = &containerRecord{SandboxID: sandbox, Image: in.Config.Image}
		if p := labels[labelLogPath]; path.IsAbs(p) {
			r.Container.LogPath = path.Clean(p)
		}
		return Object{Container: readContainer(in, n, r)}
	}

	return Object{}
}

func readSandbox(in container.InspectResponse, n name, r *record) *Sandbox {
	s := &Sandbox{
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
		Own:            r.Sandbox.PodResources,
		EnginePorts:    readPorts(in.HostConfig.PortBindings),
		EngineIPs:      readEngineIPs(in.NetworkSettings),
	}

	finished := readTime(in.State.FinishedAt)
	if s.Running {
		// Docker keeps the time of the last end (moby, container.State.SetRunning)
		s.Restarted = !finished.IsZero()
	} else {
		s.FinishedAt = finished
	}

	return s
}

// readEngineIPs are the addresses on the engine's own networks.
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

// readPorts are the host ports that the engine publishes, in order of their numbers.
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

// Misfit explains why a container that looks like one of a pod's is none that Read accepts. It is
// "" for an acceptable one and for containers that have nothing to do with pods. labels are those
// of a list; an image may have brought them, so the answer is a hint for people.
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
		return fmt.Sprintf("it has the name of a pod's container and not the label %s", labelType)
	case labelled && recordErr != nil && !errors.Is(recordErr, errNoRecord):
		return recordErr.Error()
	}

	return ""
}

// readNamespaces restores the pod's namespace options.
func readNamespaces(h *container.HostConfig, r *sandboxRecord) *runtimeapi.NamespaceOption {
	o := &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode(runtimeapi.NamespaceMode_value[r.Pid])}
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

func readContainer(in container.InspectResponse, n name, r *record) *Container {
	// An image without a digest has its ID as reference, and an ID that is none is left out.
	imageID, _ := model.ParseImageID(in.Image)
	c := &Container{
		ID:            model.ContainerID(in.ID),
		Name:          r.Name,
		SandboxID:     r.Container.SandboxID,
		Metadata:      &runtimeapi.ContainerMetadata{Name: n.container, Attempt: n.attempt},
		Labels:        r.Labels,
		Annotations:   r.Annotations,
		Image:         cmp.Or(r.Container.Image, in.Config.Image),
		ImageID:       imageID,
		ImageRef:      cmp.Or(r.Container.ImageRef, string(imageID)),
		Pid:           in.State.Pid,
		LogPath:       r.Container.LogPath,
		EngineLogPath: in.LogPath,
		LogDriver:     in.HostConfig.LogConfig.Type,
		Mounts:        readMounts(in, r.Container.ImageVolumes),
		ImageVolumes:  r.Container.ImageVolumes,
		Resources:     readResources(in.HostConfig, r.Container.Limits),
		Kernel:        r.Container.Limits,
		User:          readUser(in),
		StopSignal:    readSignal(in.Config.StopSignal),
		TTY:           in.Config.Tty,
		Stdin:         in.Config.OpenStdin,
		StdinOnce:     in.Config.StdinOnce,
	}

	readState(c, in)

	return c
}

// readState sets state, times, exit code and reason. A container whose start failed stays "created"
// for Docker; for the kubelet it has ended, at the time of its making, lest a back-off counts from
// 1970.
func readState(c *Container, in container.InspectResponse) {
	s := in.State
	c.CreatedAt, c.StartedAt, c.FinishedAt = readTime(in.Created), readTime(s.StartedAt), readTime(s.FinishedAt)
	switch {
	case s.Running || s.Paused || s.Restarting:
		c.State, c.FinishedAt = runtimeapi.ContainerState_CONTAINER_RUNNING, time.Time{}
		return
	case s.Status == container.StateCreated && s.Error == "" && s.ExitCode == 0:
		c.State = runtimeapi.ContainerState_CONTAINER_CREATED
		return
	}

	if c.FinishedAt.Before(c.StartedAt) {
		c.FinishedAt = c.StartedAt // the engine notes the start of a very short life after its end
	}

	c.State, c.ExitCode, c.Message = runtimeapi.ContainerState_CONTAINER_EXITED, int32(s.ExitCode),
		text.Clean(s.Error, text.MaxMessage)
	switch {
	case s.Status == container.StateCreated, c.StartedAt.IsZero(), s.Error != "" && s.ExitCode == 0:
		c.Reason = reasonCannotRun
		c.ExitCode = cmp.Or(c.ExitCode, 128) // never a success
		if c.FinishedAt.IsZero() {
			c.FinishedAt = c.CreatedAt
		}

	default:
		c.Reason = endReason(s.ExitCode, s.OOMKilled)
	}
}

func endReason(exitCode int, outOfMemory bool) string {
	switch {
	case outOfMemory:
		return reasonOOM
	case exitCode == 0:
		return reasonCompleted
	}
	return ReasonError
}

// ID returns the ID of the object, "" if there is none.
func (o Object) ID() model.ContainerID {
	switch {
	case o.Sandbox != nil:
		return o.Sandbox.ID
	case o.Container != nil:
		return o.Container.ID
	}
	return o.Unread
}

// Begun is the object when the engine has told that its process was started, before anybody has
// looked: its PID is not known.
func (o Object) Begun(at time.Time) Object {
	if o.Container != nil {
		c := *o.Container
		c.State, c.StartedAt = runtimeapi.ContainerState_CONTAINER_RUNNING, at
		return Object{Container: &c}
	}

	s := *o.Sandbox
	s.Running, s.NeverStarted, s.StartedAt = true, false, at

	return Object{Sandbox: &s}
}

// Ended is the object when the engine has told that its process has ended, before anybody has
// looked.
func (o Object) Ended(at time.Time, exitCode int, outOfMemory bool) Object {
	if o.Container != nil {
		c := *o.Container
		c.State, c.FinishedAt, c.ExitCode, c.Pid = runtimeapi.ContainerState_CONTAINER_EXITED, at, int32(exitCode), 0
		c.Reason = endReason(exitCode, outOfMemory)
		return Object{Container: &c}
	}

	s := *o.Sandbox
	s.Running, s.Restarted, s.FinishedAt, s.ExitCode, s.Pid = false, false, at, exitCode, 0

	return Object{Sandbox: &s}
}

// OutOfMemory is the container when the kernel, not the engine, says that its end was the OOM
// killer's work.
func (o Object) OutOfMemory() Object {
	c := *o.Container
	c.Reason = reasonOOM
	return Object{Container: &c}
}

// readTime is a Docker time; what is unset ("0001-01-01T00:00:00Z") or broken is zero.
func readTime(s string) time.Time {
	t, err := time.Parse(time.RFC3339Nano, s)
	if err != nil || t.Year() <= 1 {
		return time.Time{}
	}
	return t
}

// readMounts are the bind mounts and the images, in order of their targets.
func readMounts(in container.InspectResponse, volumes []ImageVolume) []*runtimeapi.Mount {
	var out []*runtimeapi.Mount
	images := map[string]bool{}
	for _, v := range volumes {
		images[v.Target] = true
		out = append(out, v.mount())
	}

	recursive, relabelled := map[string]bool{}, map[string]bool{}
	for _, m := range in.HostConfig.Mounts {
		recursive[m.Target] = m.BindOptions != nil && m.BindOptions.ReadOnlyForceRecursive
	}

	for _, b := range in.HostConfig.Binds {
		if parts := strings.Split(b, ":"); len(parts) == 3 {
			relabelled[parts[1]] = strings.Contains(strings.ToLower(parts[2]), "z")
		}
	}

	for _, m := range in.Mounts {
		if m.Type != mount.TypeBind || images[m.Destination] {
			continue
		}

		out = append(out, &runtimeapi.Mount{
			HostPath:          m.Source,
			ContainerPath:     m.Destination,
			Readonly:          !m.RW,
			Propagation:       readPropagation(m.Propagation),
			RecursiveReadOnly: recursive[m.Destination],
			SelinuxRelabel:    relabelled[m.Destination],
		})
	}

	slices.SortFunc(out, func(a, b *runtimeapi.Mount) int { return strings.Compare(a.ContainerPath, b.ContainerPath) })

	return out
}

// readUser is the process's user as far as numbers are known; nil where only names are.
func readUser(in container.InspectResponse) *runtimeapi.ContainerUser {
	user, group, _ := strings.Cut(in.Config.User, ":")
	if user == "" {
		user = "0"
	}

	uid, err := strconv.ParseInt(user, 10, 64)
	if err != nil {
		return nil
	}

	gid, err := strconv.ParseInt(cmp.Or(group, "0"), 10, 64)
	if err != nil {
		return nil
	}

	u := &runtimeapi.LinuxContainerUser{Uid: uid, Gid: gid, SupplementalGroups: []int64{gid}}
	for _, g := range in.HostConfig.GroupAdd {
		if n, err := strconv.ParseInt(g, 10, 64); err == nil && !slices.Contains(u.SupplementalGroups, n) {
			u.SupplementalGroups = append(u.SupplementalGroups, n)
		}
	}

	return &runtimeapi.ContainerUser{Linux: u}
}

// ReadImage translates what Docker's list says of an image and what only its inspect says. The
// error is InvalidArgument for an answer whose ID is none. Pins are the caller's: an image cannot
// pin itself.
func ReadImage(s image.Summary, in image.InspectResponse) (*Image, error) {
	id, err := model.ParseImageID(s.ID)
	if err != nil {
		return nil, err
	}

	i := &Image{
		ID:   id,
		Size: s.Size,
	}

	i.RepoTags, i.RepoDigests = imageNames(s.RepoTags, s.RepoDigests)
	labels := s.Labels
	// the containerd store's list leaves out digests of an image that is in several repositories
	if in.ID != "" {
		i.RepoTags, i.RepoDigests = imageNames(in.RepoTags, in.RepoDigests)
	}

	if c := in.Config; c != nil {
		i.User = text.Clean(c.User, text.MaxName)
		i.Entrypoint = len(c.Entrypoint)+len(c.Cmd) > 0
		if c.Labels != nil {
			labels = c.Labels
		}
	}

	var whole bool
	i.Labels, whole = boundLabels(labels)
	i.manyLabels = !whole

	return i, nil
}

// StaleAfter returns the record of an image of which only the list is known, completed by what was
// known before, which may be nil. What an ID stands for never changes.
func (i *Image) StaleAfter(before *Image) *Image {
	out := *i
	out.Stale, out.manyLabels = true, true
	if before != nil {
		out.User, out.Entrypoint = before.User, before.Entrypoint
		out.Labels, out.manyLabels = before.Labels, before.manyLabels
	}
	return &out
}

// imageNames returns an image's tags and digests. The containerd store lists an image that was
// pulled by digest with that among its tags.
func imageNames(tags, digests []string) (_, _ []string) {
	tags, digests = validNames(tags), validNames(digests)
	for _, name := range tags {
		if strings.Contains(name, "@") && !slices.Contains(digests, name) {
			digests = append(digests, name)
		}
	}

	tags = slices.DeleteFunc(tags, func(name string) bool { return strings.Contains(name, "@") })

	return tags, digests
}

// validNames leaves out the placeholders that old engines list for images without a name, and what
// cannot be a name.
func validNames(refs []string) []string {
	return slices.DeleteFunc(slices.Clone(refs), func(r string) bool {
		return strings.HasPrefix(r, "<none>") || len(r) > text.MaxName || !utf8.ValidString(r)
	})
}
