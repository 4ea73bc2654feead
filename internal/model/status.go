package model

import (
	"net/netip"
	"strconv"
	"strings"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// nanos returns Unix time in nanoseconds, 0 for the zero time.
func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func (s *Sandbox) state() runtimeapi.PodSandboxState {
	if s.Ready() {
		return runtimeapi.PodSandboxState_SANDBOX_READY
	}
	return runtimeapi.PodSandboxState_SANDBOX_NOTREADY
}

// Item returns the sandbox as an item of ListPodSandbox.
func (s *Sandbox) Item() *runtimeapi.PodSandbox {
	return &runtimeapi.PodSandbox{
		Id:             string(s.ID),
		Metadata:       s.Metadata,
		State:          s.state(),
		CreatedAt:      nanos(s.CreatedAt),
		Labels:         s.Labels,
		Annotations:    s.Annotations,
		RuntimeHandler: s.RuntimeHandler,
	}
}

// Status returns the sandbox for PodSandboxStatus. ips are the pod's addresses, the primary one
// first. A pod on the host network has none.
func (s *Sandbox) Status(ips []netip.Addr) *runtimeapi.PodSandboxStatus {
	n := &runtimeapi.PodSandboxNetworkStatus{}
	for i, ip := range ips {
		if i == 0 {
			n.Ip = ip.String()
		} else {
			n.AdditionalIps = append(n.AdditionalIps, &runtimeapi.PodIP{Ip: ip.String()})
		}
	}

	return &runtimeapi.PodSandboxStatus{
		Id:             string(s.ID),
		Metadata:       s.Metadata,
		State:          s.state(),
		CreatedAt:      nanos(s.CreatedAt),
		Network:        n,
		Linux:          &runtimeapi.LinuxPodSandboxStatus{Namespaces: &runtimeapi.Namespace{Options: s.Namespaces}},
		Labels:         s.Labels,
		Annotations:    s.Annotations,
		RuntimeHandler: s.RuntimeHandler,
	}
}

// Item returns the container as an item of ListContainers.
func (c *Container) Item() *runtimeapi.Container {
	return &runtimeapi.Container{
		Id:           string(c.ID),
		PodSandboxId: string(c.SandboxID),
		Metadata:     c.Metadata,
		Image:        &runtimeapi.ImageSpec{Image: c.Image},
		ImageRef:     c.ImageRef,
		ImageId:      string(c.ImageID),
		State:        c.State,
		CreatedAt:    nanos(c.CreatedAt),
		Labels:       c.Labels,
		Annotations:  c.Annotations,
	}
}

// Status returns the container for ContainerStatus. After a failed start the start time is the exit
// time: the kubelet would show the year 1970 otherwise.
func (c *Container) Status() *runtimeapi.ContainerStatus {
	startedAt := c.StartedAt
	if startedAt.IsZero() && c.State == runtimeapi.ContainerState_CONTAINER_EXITED {
		startedAt = c.FinishedAt
	}

	return &runtimeapi.ContainerStatus{
		Id:          string(c.ID),
		Metadata:    c.Metadata,
		State:       c.State,
		CreatedAt:   nanos(c.CreatedAt),
		StartedAt:   nanos(startedAt),
		FinishedAt:  nanos(c.FinishedAt),
		ExitCode:    c.ExitCode,
		Reason:      c.Reason,
		Message:     c.Message,
		Image:       &runtimeapi.ImageSpec{Image: c.Image},
		ImageRef:    c.ImageRef,
		ImageId:     string(c.ImageID),
		Labels:      c.Labels,
		Annotations: c.Annotations,
		Mounts:      c.Mounts,
		LogPath:     c.LogPath,
		Resources:   c.Resources,
		User:        c.User,
		StopSignal:  c.StopSignal,
	}
}

// CRI returns the image for the image service. pinned means that the kubelet must not remove it.
func (i *Image) CRI(pinned bool) *runtimeapi.Image {
	out := &runtimeapi.Image{
		Id:          string(i.ID),
		RepoTags:    i.RepoTags,
		RepoDigests: i.RepoDigests,
		Size:        uint64(max(i.Size, 1)),
		Pinned:      pinned,
		Spec:        &runtimeapi.ImageSpec{Image: string(i.ID)},
	}

	user, _, _ := strings.Cut(i.User, ":")
	if uid, err := strconv.ParseInt(user, 10, 64); err == nil {
		out.Uid = &runtimeapi.Int64Value{Value: uid}
	} else {
		out.Username = user
	}

	return out
}

// MatchSandbox reports whether a sandbox passes the filter of ListPodSandbox. Its ID may be a
// prefix.
func MatchSandbox(f *runtimeapi.PodSandboxFilter, s *Sandbox) bool {
	return strings.HasPrefix(string(s.ID), f.GetId()) &&
		(f.GetState() == nil || f.GetState().GetState() == s.state()) &&
		matchLabels(f.GetLabelSelector(), s.Labels)
}

// MatchContainer reports whether a container passes the filter of ListContainers. Its IDs may be
// prefixes.
func MatchContainer(f *runtimeapi.ContainerFilter, c *Container) bool {
	return strings.HasPrefix(string(c.ID), f.GetId()) && strings.HasPrefix(string(c.SandboxID), f.GetPodSandboxId()) &&
		(f.GetState() == nil || f.GetState().GetState() == c.State) &&
		matchLabels(f.GetLabelSelector(), c.Labels)
}

func matchLabels(selector, labels map[string]string) bool {
	for k, v := range selector {
		if got, ok := labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}
