package takeover

import (
	"fmt"
	"maps"
	"slices"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/logs/driver"
	"cri-dockerd/internal/model"
	"cri-dockerd/internal/spec"
)

// oddSandbox is what an operator should know of one pod.
func (s *survey) oddSandbox(sb *spec.Sandbox) (out []Finding) {
	say := func(byHand bool, says, mend string) { out = append(out, Finding{byHand, title(sb), says, mend}) }
	if p := s.notes[string(sb.ID)].problem; p != "" {
		say(false, p, "its network is released without it")
	}
	if !sb.Running && s.runs(string(sb.ID)) {
		say(false, "its pause process is dead and containers of it run", "the kubelet makes the pod anew, as it does with every shim")
	}
	if sb.Running {
		s.oddNetwork(sb, say)
	}
	return out
}

// oddNetwork is what is odd about the network of a pod that runs.
func (s *survey) oddNetwork(sb *spec.Sandbox, say func(byHand bool, says, mend string)) {
	c, cached := s.cache[string(sb.ID)]
	switch {
	case sb.HostNetwork():
		return
	case sb.EngineNetwork() && s.plugin != "":
		say(false, "it is on Docker's own bridge, and pods of --network-plugin="+s.plugin+" are not", "it stays there until it is made anew")
		return
	case sb.EngineNetwork():
		return
	case s.plugin == "":
		say(true, "CNI has connected it, and with an empty --network-plugin its address is not known: the kubelet would make it anew", "give the daemon --network-plugin=cni")
		return
	}
	if len(s.addresses(sb)) == 0 {
		say(false, "it has no address", "the kubelet makes the pod anew, as it does with every shim")
	}
	switch {
	case !cached && sb.Foreign:
		say(false, "the CNI cache does not say how it was connected", "its address is read from its network namespace; it is released with the configuration of that day, so keep the network add-on")
	case c.Problem != "":
		say(true, c.Problem+"; its network cannot be released", "delete the pod while the older shim runs: kubectl delete pod -n "+sb.Metadata.GetNamespace()+" "+sb.Metadata.GetName())
	case cached && !c.MapsPorts && len(s.ports(sb)) > 0:
		say(true, fmt.Sprintf("no plugin of its network %s maps host ports, so the older shim did, and only that one removes its rules for %v", c.Network, portNames(s.ports(sb))),
			"delete the pod while the older shim runs: kubectl delete pod -n "+sb.Metadata.GetNamespace()+" "+sb.Metadata.GetName())
	}
}

// runs says whether a container of a sandbox runs.
func (s *survey) runs(sandbox string) bool {
	return slices.ContainsFunc(s.containersOf(model.ContainerID(sandbox)), func(c *spec.Container) bool { return c.State == runtimeapi.ContainerState_CONTAINER_RUNNING })
}

// oddLog is what is odd about a container's log.
func (s *survey) oddLog(pod string, c *spec.Container) []Finding {
	if c.LogPath == "" || c.LogDriver == driver.Name || c.State != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return nil
	}
	name := pod + ", container " + c.Metadata.Name
	switch {
	case c.EngineLogPath == "":
		return []Finding{{false, name, fmt.Sprintf("Docker's log driver %q keeps no file, so kubectl logs shows nothing", c.LogDriver), "that ends when the container is made anew"}}
	case s.links[string(c.ID)] != c.EngineLogPath:
		return []Finding{{true, name, fmt.Sprintf("%s is no link to Docker's log, so kubectl logs shows nothing", c.LogPath), fmt.Sprintf("ln -sfn %s %s", c.EngineLogPath, c.LogPath)}}
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
			out = append(out, Finding{false, n.Namespace + "/" + n.Name, fmt.Sprintf("%s notes a sandbox whose container is gone", n.file), "its network is released at the start, and the note removed"})
		}
	}
	for _, o := range s.objects {
		if c := o.Container; c != nil && !known[string(c.SandboxID)] {
			out = append(out, Finding{false, "container " + c.Name, "its sandbox is gone", "the kubelet removes it"})
		}
	}
	if own > 0 {
		out = append(out, Finding{false, plural(own, "pod") + " of this release", "their network namespaces are our own, which an older shim takes for the host's",
			"before a way back they need a drain; takeover --hand-back --dry-run lists them"})
	}
	return out
}
