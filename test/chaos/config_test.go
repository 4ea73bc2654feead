package chaos

import (
	"fmt"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/test/engines"
)

// config returns the sandbox's configuration.
func (p *pod) config(attempt uint32) *runtimeapi.PodSandboxConfig {
	cfg := &runtimeapi.PodSandboxConfig{
		Metadata:     &runtimeapi.PodSandboxMetadata{Name: p.uid, Namespace: "chaos", Uid: p.uid, Attempt: attempt},
		LogDirectory: p.logDir(),
		Labels:       map[string]string{"io.kubernetes.pod.uid": p.uid},
		DnsConfig:    &runtimeapi.DNSConfig{Servers: []string{"192.0.2.53"}},
		Linux: &runtimeapi.LinuxPodSandboxConfig{
			CgroupParent: p.eng.CgroupParent + "/" + p.uid,
			SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER},
			},
		},
	}
	if p.hostNetwork {
		cfg.Linux.SecurityContext.NamespaceOptions.Network = runtimeapi.NamespaceMode_NODE
		return cfg
	}

	cfg.Hostname = p.uid
	if p.slot%2 == 1 {
		cfg.PortMappings = []*runtimeapi.PortMapping{{
			Protocol:      runtimeapi.Protocol_TCP,
			ContainerPort: 80,
			HostPort:      int32(20000 + p.slot),
		}}
	}

	return cfg
}

// script prints numbered lines, some of them long, and records each printed line.
const script = `trap 'exit 0' TERM
exec 2>/dev/null # the shell reports the death of its children
i=0
while :; do
	for n in 1 2 3 4 5; do
		if [ $((i % 50)) = 49 ]; then printf 'line %d %020000d\n' $i 0; else echo "line $i"; fi
		echo $i >> /state/FILE
		i=$((i+1))
	done
	[ LIMIT = 0 ] || [ $i -lt LIMIT ] || exit 3
	sleep 0.5
done`

// container returns the configuration of one of the pod's containers.
func (p *pod) container(name string, attempt uint32) *runtimeapi.ContainerConfig {
	limit := 0
	if name == p.containers[len(p.containers)-1] {
		limit = p.limit
	}

	text := strings.NewReplacer("FILE", fmt.Sprintf("%s.%d", name, attempt), "LIMIT", fmt.Sprint(limit)).Replace(script)
	network := runtimeapi.NamespaceMode_POD
	if p.hostNetwork {
		network = runtimeapi.NamespaceMode_NODE
	}

	return &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name, Attempt: attempt},
		Image:    &runtimeapi.ImageSpec{Image: engines.Busybox},
		Command:  []string{"sh", "-c", text},
		LogPath:  fmt.Sprintf("%s/%d.log", name, attempt),
		Labels:   map[string]string{"io.kubernetes.pod.uid": p.uid},
		Mounts:   []*runtimeapi.Mount{{HostPath: p.stateDir(), ContainerPath: "/state"}},
		Linux: &runtimeapi.LinuxContainerConfig{
			Resources: &runtimeapi.LinuxContainerResources{CpuShares: 10},
			SecurityContext: &runtimeapi.LinuxContainerSecurityContext{
				NamespaceOptions: &runtimeapi.NamespaceOption{
					Network: network,
					Pid:     runtimeapi.NamespaceMode_CONTAINER,
				},
			},
		},
	}
}
