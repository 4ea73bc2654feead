package cri

import (
	"context"
	"fmt"
	"net/netip"
	"strings"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/translate"
)

const (
	// runtimeName is the name in the node's status and in tools: docker://<version>.
	runtimeName = "docker"
	// kubeletAPI is the version of the kubelet's runtime API, constant since the CRI exists (CRI
	// VersionRequest).
	kubeletAPI = "0.1.0"
	criVersion = "v1"
)

// Version returns the name and version of the runtime (CRI Version).
func (s *Service) Version(_ context.Context, _ *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	host, err := s.connectedHost()
	if err != nil {
		return nil, err
	}

	return &runtimeapi.VersionResponse{
		Version:           kubeletAPI,
		RuntimeName:       runtimeName,
		RuntimeVersion:    host.EngineVersion,
		RuntimeApiVersion: criVersion,
	}, nil
}

// Status reports whether the runtime and the network are ready, with reasons if not (CRI Status).
// It works while the engine is down.
func (s *Service) Status(_ context.Context, r *runtimeapi.StatusRequest) (*runtimeapi.StatusResponse, error) {
	e := s.View.Engine()
	runtime := &runtimeapi.RuntimeCondition{Type: runtimeapi.RuntimeReady, Status: e.Ready}
	if !e.Ready {
		runtime.Reason, runtime.Message = "DockerNotReady", e.Reason
	}

	logs, netns := logsCondition(s.Logs), netnsCondition(s.joining.reason(), s.Node.ConnectsPods(), e.Host)
	if e.Ready && logs.Reason == logsNotReady {
		runtime.Status, runtime.Reason, runtime.Message = false, logs.Reason, logs.Message
	}

	network := &runtimeapi.RuntimeCondition{Type: runtimeapi.NetworkReady, Status: true}
	if notice, err := s.Node.State(); err != nil {
		network.Status, network.Reason, network.Message = false, "NetworkPluginNotReady", err.Error()
	} else if notice != "" {
		network.Reason, network.Message = "NetworkWarning", notice
	}

	// Without a feature a kubelet rejects pods for good, or does not ask again. So Status denies it
	// only when that is certain. Until then RunPodSandbox waits, or refuses such a pod and is
	// repeated.
	hasShim := e.Ready && e.Host.Shim.MayBeActive()
	resp := &runtimeapi.StatusResponse{
		Status:   &runtimeapi.RuntimeStatus{Conditions: []*runtimeapi.RuntimeCondition{runtime, network, logs, netns}},
		Features: &runtimeapi.RuntimeFeatures{SupplementalGroupsPolicy: hasShim, MountOptions: hasShim},
	}
	if e.Ready && e.Host.Shim.IsWanted() {
		resp.Status.Conditions = append(resp.Status.Conditions, shimCondition(e.Host.Shim))
	}

	if s.Plugins != nil {
		resp.Status.Conditions = append(resp.Status.Conditions, pluginsCondition(s.Plugins.State()))
	}

	fitConditions(resp.Status.Conditions)
	if e.Ready {
		resp.RuntimeHandlers = runtimeHandlers(e.Host)
	}

	if !r.GetVerbose() {
		return resp, nil
	}

	info, err := verboseInfo(map[string]any{
		"engine":     e.Host,
		"sandboxes":  len(s.View.Sandboxes()),
		"containers": len(s.View.Containers()),
	})

	resp.Info = info

	return resp, err
}

// Condition for the log mode of containers. The kubelet ignores it; crictl info shows it.
const (
	containerLogs = "ContainerLogs"
	logsNotReady  = "LogDriverNotReady"
)

// runtimeHandlers returns the runtime handlers with their features, first the default one.
func runtimeHandlers(h model.Host) []*runtimeapi.RuntimeHandler {
	handlers := []*runtimeapi.RuntimeHandler{{
		Features: &runtimeapi.RuntimeHandlerFeatures{
			RecursiveReadOnlyMounts: h.RecursiveReadOnly() || h.Shim.IsActive(),
			UserNamespaces:          h.UserNSProblem() == "",
		},
	}}

	features := &runtimeapi.RuntimeHandlerFeatures{RecursiveReadOnlyMounts: h.RecursiveReadOnly()}
	for _, name := range h.Runtimes {
		handlers = append(handlers, &runtimeapi.RuntimeHandler{Name: name, Features: features})
	}

	return handlers
}

// Condition for the creator of pod network namespaces.
const podNetNS = "PodNetworkNamespaces"

// netnsCondition reports whether the daemon creates the network namespaces of pods, with the reason
// if it does not. reason comes from joining.
func netnsCondition(reason string, connectsPods bool, host model.Host) *runtimeapi.RuntimeCondition {
	c := &runtimeapi.RuntimeCondition{Type: podNetNS, Status: true, Reason: "CreatedByDaemon"}
	if reason == "" {
		reason = translate.EngineNetNS(&runtimeapi.RunPodSandboxRequest{}, host)
	}
	if !connectsPods {
		reason = "the engine connects the pods"
	}
	if reason != "" {
		c.Status, c.Reason, c.Message = false, "CreatedByEngine", reason
	}

	return c
}

// logsCondition reports the active mode of --container-log, with the reason if it is not the
// preferred one.
func logsCondition(logs Logs) *runtimeapi.RuntimeCondition {
	active, reason := logs.State()
	c := &runtimeapi.RuntimeCondition{Type: containerLogs, Status: reason == "", Message: reason}
	switch active {
	case "":
		c.Reason = logsNotReady
	case "cri":
		c.Reason = "CRIFiles"
	default:
		c.Reason = "JSONFile"
	}

	return c
}

// RuntimeConfig returns the engine's cgroup driver (CRI RuntimeConfig).
func (s *Service) RuntimeConfig(
	_ context.Context, _ *runtimeapi.RuntimeConfigRequest,
) (*runtimeapi.RuntimeConfigResponse, error) {
	host, err := s.connectedHost()
	if err != nil {
		return nil, err
	}

	driver := runtimeapi.CgroupDriver_CGROUPFS
	if host.CgroupDriver == "systemd" {
		driver = runtimeapi.CgroupDriver_SYSTEMD
	}

	return &runtimeapi.RuntimeConfigResponse{Linux: &runtimeapi.LinuxRuntimeConfiguration{CgroupDriver: driver}}, nil
}

// UpdateRuntimeConfig sets the node's pod CIDR, one or two separated by a comma (CRI
// UpdateRuntimeConfig). An empty value changes nothing.
func (s *Service) UpdateRuntimeConfig(
	_ context.Context, r *runtimeapi.UpdateRuntimeConfigRequest,
) (*runtimeapi.UpdateRuntimeConfigResponse, error) {
	var cidrs []netip.Prefix
	for part := range strings.SplitSeq(r.GetRuntimeConfig().GetNetworkConfig().GetPodCidr(), ",") {
		if part = strings.TrimSpace(part); part == "" {
			continue
		}

		p, err := netip.ParsePrefix(part)
		if err != nil {
			return nil, fmt.Errorf("runtime_config.network_config.pod_cidr: %w: %w", err, errdefs.ErrInvalidArgument)
		}

		cidrs = append(cidrs, p.Masked())
	}

	return &runtimeapi.UpdateRuntimeConfigResponse{}, s.Node.SetPodCIDR(cidrs)
}
