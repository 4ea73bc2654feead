package takeover

import (
	"fmt"
	"maps"
	"slices"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/logs/driver"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/shell"
)

// sandboxFindings returns the findings about one pod.
func (s *survey) sandboxFindings(sb *model.Sandbox) (out []Finding) {
	report := func(actionRequired bool, detail string, fix shell.Line) {
		out = append(out, newFinding(actionRequired, title(sb), detail, fix))
	}
	if p := s.checkpoints[string(sb.ID)].problem; p != "" {
		report(false, p, shell.Advice("its network is released without the checkpoint"))
	}

	if !sb.Running && s.hasRunningContainer(string(sb.ID)) {
		report(false, "its pause process has exited, but its containers are running",
			shell.Advice("the kubelet recreates the pod, as with any shim"))
	}

	if sb.Running {
		s.networkFindings(sb, report)
	}

	return out
}

// networkFindings reports findings about the network of a running pod.
func (s *survey) networkFindings(sb *model.Sandbox, report func(actionRequired bool, detail string, fix shell.Line)) {
	c, cached := s.cache[string(sb.ID)]
	switch {
	case sb.HostNetwork():
		return
	case sb.EngineNetwork() && s.plugin != "":
		report(false, "it is on Docker's own bridge, unlike pods with --network-plugin="+s.plugin,
			shell.Advice("it stays there until it is recreated"))
		return

	case sb.EngineNetwork():
		return
	case s.plugin == "":
		report(true, "it was connected by CNI; with an empty --network-plugin its address is unknown, and the kubelet "+
			"would recreate it", shell.Advice("start the daemon with --network-plugin=cni"))
		return
	}

	if len(s.addresses(sb)) == 0 {
		report(false, "it has no address", shell.Advice("the kubelet recreates the pod, as with any shim"))
	}

	switch {
	case !cached && sb.Foreign:
		report(false, "its connection is missing from the CNI cache",
			shell.Advice("its address is read from its network namespace; it will be released with the CNI "+
				"configuration at that time, so keep the network add-on"))

	case c.Problem != "":
		report(true, c.Problem+"; its network cannot be released", deletePod(sb))
	case cached && !c.MapsPorts && len(s.ports(sb)) > 0:
		report(true, fmt.Sprintf("no plugin of its network %s maps host ports; only the older shim can remove its "+
			"rules for %v", c.Network, portNames(s.ports(sb))), deletePod(sb))
	}
}

// deletePod is the fix for a pod that only the older shim can release.
func deletePod(sb *model.Sandbox) shell.Line {
	return shell.Advice("delete the pod while the older shim runs: kubectl delete pod -n {} {}",
		sb.Metadata.GetNamespace(), sb.Metadata.GetName())
}

// hasRunningContainer reports whether a sandbox has a running container.
func (s *survey) hasRunningContainer(sandbox string) bool {
	return slices.ContainsFunc(s.containersOf(model.ContainerID(sandbox)), func(c *model.Container) bool {
		return c.State == runtimeapi.ContainerState_CONTAINER_RUNNING
	})
}

// logFindings returns the findings about a container's log.
func (s *survey) logFindings(pod string, c *model.Container) []Finding {
	if c.LogPath == "" || c.LogDriver == driver.Name || c.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return nil
	}

	name := pod + ", container " + c.Metadata.Name
	switch {
	case c.EngineLogPath == "":
		return []Finding{newFinding(false, name,
			fmt.Sprintf("Docker's log driver %q writes no file, so kubectl logs returns nothing", c.LogDriver),
			shell.Advice("recreate the container"))}

	case s.logLinks[string(c.ID)] != c.EngineLogPath:
		return []Finding{newFinding(true, name,
			fmt.Sprintf("%s is not a link to Docker's log, so kubectl logs returns nothing", clean(c.LogPath)),
			shell.Command("ln -sfn {} {}", c.EngineLogPath, c.LogPath))}
	}

	return nil
}

// leftoverFindings returns the findings about incomplete pods and obstacles to a hand-back.
func (s *survey) leftoverFindings() (out []Finding) {
	known, own := map[string]bool{}, 0
	for _, sb := range s.sandboxes() {
		known[string(sb.ID)] = true
		if sb.OwnNetNS && sb.Running {
			own++
		}
	}

	for _, id := range slices.Sorted(maps.Keys(s.checkpoints)) {
		if n := s.checkpoints[id]; !known[id] {
			out = append(out, newFinding(false, n.Namespace+"/"+n.Name,
				fmt.Sprintf("%s is the checkpoint of a removed sandbox", n.file),
				shell.Advice("the daemon releases its network and removes the checkpoint at its start")))
		}
	}

	for _, o := range s.objects {
		if c := o.Container; c != nil && !known[string(c.SandboxID)] {
			out = append(out, newFinding(false, "container "+c.Name, "its sandbox was removed",
				shell.Advice("the kubelet removes it")))
		}
	}

	if own > 0 {
		out = append(out, newFinding(false, plural(own, "pod")+" of this release",
			"their network namespaces were created by this daemon; an older shim treats them as the host network",
			shell.Advice("drain them before a hand-back; takeover --hand-back --dry-run lists them")))
	}

	return out
}
