package translate

import (
	"cmp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/text"
)

// readContainer returns the record of a container. ImageRef is the image's ID if the image has no
// digest, and "" if Docker's ID is invalid.
func readContainer(in container.InspectResponse, n name, r *record) *model.Container {
	imageID, _ := model.ParseImageID(in.Image)
	c := &model.Container{
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
		User:          readUser(in, r.Container.User),
		StopSignal:    readSignal(in.Config.StopSignal),
		TTY:           in.Config.Tty,
		Stdin:         in.Config.OpenStdin,
		StdinOnce:     in.Config.StdinOnce,
		ExecOutput:    readAnnotation(in.HostConfig).Output,
		Plugged:       readPlugged(in.HostConfig, r.Container.Plugins),
	}

	readState(c, in)

	return c
}

// readState sets state, times, exit code and reason. After a failed start Docker reports "created".
// The kubelet gets an exit at the time of creation: its back-off would count from 1970 otherwise.
func readState(c *model.Container, in container.InspectResponse) {
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
		c.FinishedAt = c.StartedAt // for a short-lived process the engine may record the start after the exit
	}

	c.State, c.ExitCode, c.Message = runtimeapi.ContainerState_CONTAINER_EXITED, int32(s.ExitCode),
		text.Clean(s.Error, text.MaxMessage)
	switch {
	case s.Status == container.StateCreated, c.StartedAt.IsZero(), s.Error != "" && s.ExitCode == 0:
		c.Reason = model.ReasonCannotRun
		c.ExitCode = cmp.Or(c.ExitCode, 128) // never a success
		if c.FinishedAt.IsZero() {
			c.FinishedAt = c.CreatedAt
		}

	default:
		c.Reason = model.ExitReason(s.ExitCode, s.OOMKilled)
	}
}

// readMounts returns the bind mounts and image mounts, sorted by target.
func readMounts(in container.InspectResponse, volumes []model.ImageVolume) []*runtimeapi.Mount {
	var out []*runtimeapi.Mount
	images := map[string]bool{}
	for _, v := range volumes {
		images[v.Target] = true
		out = append(out, readImageVolume(v))
	}

	recursive, relabelled := map[string]bool{}, map[string]bool{}
	for _, m := range in.HostConfig.Mounts {
		recursive[m.Target] = m.BindOptions != nil && m.BindOptions.ReadOnlyForceRecursive
	}
	uids, gids, mapped := readMappings(in.HostConfig)
	options := readAnnotation(in.HostConfig).MountOptions
	for _, target := range readAnnotation(in.HostConfig).RecursiveReadOnly {
		recursive[target] = true
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

		read := &runtimeapi.Mount{
			HostPath:          m.Source,
			ContainerPath:     m.Destination,
			Readonly:          !m.RW,
			Propagation:       readPropagation(m.Propagation),
			RecursiveReadOnly: recursive[m.Destination],
			SelinuxRelabel:    relabelled[m.Destination],
		}
		read.MountOptions = options[m.Destination]
		if slices.Contains(mapped, m.Destination) {
			read.UidMappings, read.GidMappings = uids, gids
		}

		out = append(out, read)
	}

	slices.SortFunc(out, func(a, b *runtimeapi.Mount) int { return strings.Compare(a.ContainerPath, b.ContainerPath) })

	return out
}

// readUser returns the user and groups of the process: those of the record, or else those that
// Docker knows, nil if it has only their names.
func readUser(in container.InspectResponse, recorded *model.User) *runtimeapi.ContainerUser {
	if recorded != nil {
		return &runtimeapi.ContainerUser{Linux: &runtimeapi.LinuxContainerUser{
			Uid:                recorded.UID,
			Gid:                recorded.GID,
			SupplementalGroups: recorded.Groups,
		}}
	}

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

// readResources returns a container's resources: Docker's actual ones, and the requested kernel
// limits.
func readResources(h *container.HostConfig, l model.KernelLimits) *runtimeapi.ContainerResources {
	r := &runtimeapi.LinuxContainerResources{
		CpuPeriod:              h.CPUPeriod,
		CpuQuota:               h.CPUQuota,
		CpuShares:              h.CPUShares,
		MemoryLimitInBytes:     h.Memory,
		MemorySwapLimitInBytes: h.MemorySwap,
		CpusetCpus:             h.CpusetCpus,
		CpusetMems:             h.CpusetMems,
		OomScoreAdj:            int64(h.OomScoreAdj),
	}

	for _, limit := range []*int64{&r.MemoryLimitInBytes, &r.MemorySwapLimitInBytes} {
		if *limit >= noMemoryLimit {
			*limit = -1 // unlimited
		}
	}

	l.SetOn(r)

	return &runtimeapi.ContainerResources{Linux: r}
}
