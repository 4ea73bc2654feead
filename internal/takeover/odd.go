package takeover

import (
	"fmt"
	"maps"
	"slices"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/logs/driver"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/shell"
	"cri-dockerd/internal/spec"
)

// oddSandbox is what an operator should know of one pod.
func (s *survey) oddSandbox(sb *spec.Sandbox) (out []Finding) {
	report := func(byHand bool, detail string, fix shell.Line) {
		out = append(out, newFinding(byHand, title(sb), detail, fix))
	}
	if p := s.notes[string(sb.ID)].problem; p != "" {
		report(false, p, shell.Advice("its network is released without it"))
	}

	if !sb.Running && s.runs(string(sb.ID)) {
		report(false, "its pause process is dead and containers of it run",
			shell.Advice("the kubelet makes the pod anew, as it does with every shim"))
	}

	if sb.Running {
		s.oddNetwork(sb, report)
	}

	return out
}

// oddNetwork is what is odd about the network of a pod that runs.
func (s *survey) oddNetwork(sb *spec.Sandbox, report func(byHand bool, detail string, fix shell.Line)) {
	c, cached := s.cache[string(sb.ID)]
	switch {
	case sb.HostNetwork():
		return
	case sb.EngineNetwork() && s.plugin != "":
		report(false, "it is on Docker's own bridge, and pods of --network-plugin="+s.plugin+" are not",
			shell.Advice("it stays there until it is made anew"))
		return

	case sb.EngineNetwork():
		return
	case s.plugin == "":
		report(true, "CNI has connected it, and with an empty --network-plugin its address is not known: the "+
			"kubelet would make it anew", shell.Advice("give the daemon --network-plugin=cni"))
		return
	}

	if len(s.addresses(sb)) == 0 {
		report(false, "it has no address", shell.Advice("the kubelet makes the pod anew, as it does with every shim"))
	}

	switch {
	case !cached && sb.Foreign:
		report(false, "the CNI cache does not say how it was connected",
			shell.Advice("its address is read from its network namespace; it is released with the configuration of "+
				"that day, so keep the network add-on"))

	case c.Problem != "":
		report(true, c.Problem+"; its network cannot be released", deletePod(sb))
	case cached && !c.MapsPorts && len(s.ports(sb)) > 0:
		report(true, fmt.Sprintf("no plugin of its network %s maps host ports, so the older shim did, and only that "+
			"one removes its rules for %v", c.Network, portNames(s.ports(sb))),
			deletePod(sb))
	}
}

// deletePod is what to do with a pod that only the older shim can release.
func deletePod(sb *spec.Sandbox) shell.Line {
	return shell.Advice("delete the pod while the older shim runs: kubectl delete pod -n {} {}",
		sb.Metadata.GetNamespace(), sb.Metadata.GetName())
}

// runs says whether a container of a sandbox runs.
func (s *survey) runs(sandbox string) bool {
	return slices.ContainsFunc(s.containersOf(model.ContainerID(sandbox)), func(c *spec.Container) bool {
		return c.State == runtimeapi.ContainerState_CONTAINER_RUNNING
	})
}

// oddLog is what is odd about a container's log.
func (s *survey) oddLog(pod string, c *spec.Container) []Finding {
	if c.LogPath == "" || c.LogDriver == driver.Name || c.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return nil
	}

	name := pod + ", container " + c.Metadata.Name
	switch {
	case c.EngineLogPath == "":
		return []Finding{newFinding(false, name,
			fmt.Sprintf("Docker's log driver %q keeps no file, so kubectl logs shows nothing", c.LogDriver),
			shell.Advice("that ends when the container is made anew"))}

	case s.links[string(c.ID)] != c.EngineLogPath:
		return []Finding{newFinding(true, name,
			fmt.Sprintf("%s is no link to Docker's log, so kubectl logs shows nothing", clean(c.LogPath)),
			shell.Command("ln -sfn {} {}", c.EngineLogPath, c.LogPath))}
	}

	return nil
}

// leftovers are the parts of pods that are not whole, and what hinders the way back.
func (s *survey) leftovers() (out []Finding) {
	known, own := map[string]bool{}, 0
	for _, sb := range s.sandboxes() {
		known[string(sb.ID)] = true
		if sb.OwnNetNS && sb.Running {
			own++
		}
	}

	for _, id := range slices.Sorted(maps.Keys(s.notes)) {
		if n := s.notes[id]; !known[id] {
			out = append(out, newFinding(false, n.Namespace+"/"+n.Name,
				fmt.Sprintf("%s notes a sandbox whose container is gone", n.file),
				shell.Advice("its network is released at the start, and the note removed")))
		}
	}

	for _, o := range s.objects {
		if c := o.Container; c != nil && !known[string(c.SandboxID)] {
			out = append(out, newFinding(false, "container "+c.Name, "its sandbox is gone",
				shell.Advice("the kubelet removes it")))
		}
	}

	if own > 0 {
		out = append(out, newFinding(false, plural(own, "pod")+" of this release",
			"their network namespaces are our own, which an older shim takes for the host's",
			shell.Advice("before a way back they need a drain; takeover --hand-back --dry-run lists them")))
	}

	return out
}
