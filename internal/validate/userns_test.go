package validate

import (
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/shim/annotation"
)

// mapping returns the mapping of 65536 IDs.
func mapping(first uint32) []*runtimeapi.IDMapping {
	return []*runtimeapi.IDMapping{{HostId: first, Length: 65536}}
}

func usernsOptions() *runtimeapi.NamespaceOption {
	return &runtimeapi.NamespaceOption{
		UsernsOptions: &runtimeapi.UserNamespace{Uids: mapping(65536), Gids: mapping(131072)},
	}
}

func TestUserNamespaceRules(t *testing.T) {
	const field = "config.linux.security_context.namespace_options"
	const own = field + ".userns_options"
	tests := map[string]rule[*runtimeapi.NamespaceOption]{
		"POD": {func(*runtimeapi.NamespaceOption) {}, ""},
		"NODE": {func(o *runtimeapi.NamespaceOption) {
			o.UsernsOptions = &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_NODE}
		}, ""},
		"NODE with mappings": {func(o *runtimeapi.NamespaceOption) {
			o.UsernsOptions.Mode = runtimeapi.NamespaceMode_NODE
		}, own},
		"CONTAINER": {func(o *runtimeapi.NamespaceOption) {
			o.UsernsOptions.Mode = runtimeapi.NamespaceMode_CONTAINER
		}, own + ".mode"},
		"two mappings": {func(o *runtimeapi.NamespaceOption) {
			o.UsernsOptions.Uids = append(o.UsernsOptions.Uids, mapping(1)...)
		}, own + ".uids"},
		"no groups": {func(o *runtimeapi.NamespaceOption) { o.UsernsOptions.Gids = nil }, own + ".gids"},
		"nil mapping": {func(o *runtimeapi.NamespaceOption) {
			o.UsernsOptions.Gids = []*runtimeapi.IDMapping{nil}
		}, own + ".gids"},
		"without root": {func(o *runtimeapi.NamespaceOption) {
			o.UsernsOptions.Uids[0].ContainerId = 1
		}, own + ".uids[0].container_id"},
		"root of the node": {func(o *runtimeapi.NamespaceOption) {
			o.UsernsOptions.Gids[0].HostId = 0
		}, own + ".gids[0].host_id"},
		"no IDs": {func(o *runtimeapi.NamespaceOption) {
			o.UsernsOptions.Uids[0].Length = 0
		}, own + ".uids[0].length"},
		"ID -1": {func(o *runtimeapi.NamespaceOption) {
			o.UsernsOptions.Uids[0].HostId = 1<<32 - 1
		}, own + ".uids[0].length"},
		"host network": {func(o *runtimeapi.NamespaceOption) {
			o.Network = runtimeapi.NamespaceMode_NODE
		}, field + ".network"},
		"host IPC":  {func(o *runtimeapi.NamespaceOption) { o.Ipc = runtimeapi.NamespaceMode_NODE }, field + ".ipc"},
		"host PIDs": {func(o *runtimeapi.NamespaceOption) { o.Pid = runtimeapi.NamespaceMode_NODE }, field + ".pid"},
	}

	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			cfg := pod()
			cfg.Linux.SecurityContext.NamespaceOptions = usernsOptions()
			test.change(cfg.Linux.SecurityContext.NamespaceOptions)
			checkField(t, Request(&runtimeapi.RunPodSandboxRequest{Config: cfg}), test.field)
		})
	}
}

// TestUserNamespaceSupport checks that the error has the reason.
func TestUserNamespaceSupport(t *testing.T) {
	const field = securityField + ".namespace_options.userns_options"
	active := model.Shim{Mode: "auto"}
	broken := model.Shim{Mode: "auto", UserNSProblem: "no idmapped layers"}
	for name, test := range map[string]struct {
		shim           model.Shim
		handler, field string
		reason         string
	}{
		"shim":    {active, "", "", ""},
		"no shim": {model.Shim{}, "", field, "--containers=engine"},
		"kernel":  {broken, "", field, "no idmapped layers"},
		"handler": {active, "other", field, "runtime handler other"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := pod()
			cfg.Linux.SecurityContext.NamespaceOptions = usernsOptions()
			err := Sandbox(&runtimeapi.RunPodSandboxRequest{Config: cfg, RuntimeHandler: test.handler},
				model.Host{Shim: test.shim, Runtimes: []string{"other"}})
			checkField(t, err, test.field)
			if test.reason != "" && !strings.Contains(err.Error(), test.reason) {
				t.Errorf("error %v, want the reason %q", err, test.reason)
			}
		})
	}
}

// TestContainerUserNamespace checks a container and its mounts against its pod.
func TestContainerUserNamespace(t *testing.T) {
	const own = securityField + ".namespace_options.userns_options"
	sandbox := &model.Sandbox{Runtime: annotation.Runtime, Namespaces: usernsOptions()}
	node := &runtimeapi.NamespaceOption{UsernsOptions: &runtimeapi.UserNamespace{Mode: runtimeapi.NamespaceMode_NODE}}
	other := usernsOptions()
	other.UsernsOptions.Uids = mapping(1)
	mount := func(uid uint32) *runtimeapi.Mount {
		return &runtimeapi.Mount{
			HostPath:      "/a",
			ContainerPath: "/v",
			UidMappings:   mapping(uid),
			GidMappings:   mapping(131072),
		}
	}
	mapped, foreign := mount(65536), mount(1)
	plain := &model.Sandbox{Runtime: annotation.Runtime, Namespaces: &runtimeapi.NamespaceOption{}}
	for name, test := range map[string]struct {
		sandbox *model.Sandbox
		options *runtimeapi.NamespaceOption
		mount   *runtimeapi.Mount
		field   string
	}{
		"same":             {sandbox, usernsOptions(), mapped, ""},
		"not set":          {sandbox, nil, mapped, ""},
		"node in a pod":    {sandbox, node, nil, own},
		"other mapping":    {sandbox, other, nil, own},
		"other mount":      {sandbox, nil, foreign, "config.mounts[0].uidMappings"},
		"plain pod":        {plain, node, nil, ""},
		"in a plain pod":   {plain, usernsOptions(), nil, own},
		"mount, plain pod": {plain, nil, mapped, "config.mounts[0].uidMappings"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := container().Config
			cfg.Linux.SecurityContext.NamespaceOptions = test.options
			if test.mount != nil {
				cfg.Mounts = []*runtimeapi.Mount{test.mount}
			}
			checkField(t, Container(cfg, test.sandbox, &model.Image{Entrypoint: true}, model.Host{}), test.field)
		})
	}
}
