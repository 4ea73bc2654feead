package translate

import (
	"path"

	"github.com/moby/moby/api/types/container"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// ContainerOptions is the context of a new container.
type ContainerOptions struct {
	Host           model.Host
	Sandbox        *model.Sandbox
	Log            model.LogConfig
	Image          *model.Image
	Accounts       *model.Accounts // of the image; nil if they are unknown
	SeccompProfile string          // content of SeccompFile
	Plugins        bool            // NRI plugins must see the container
	// ImageVolumes are the image mounts of the configuration, by their index among its mounts.
	ImageVolumes map[int]model.ImageVolume
}

// LogPath returns the path of a container's log, "" if the kubelet requests none.
func LogPath(cfg *runtimeapi.ContainerConfig, pod *runtimeapi.PodSandboxConfig) string {
	if cfg.GetLogPath() == "" || pod.GetLogDirectory() == "" {
		return ""
	}
	return path.Join(pod.GetLogDirectory(), cfg.GetLogPath())
}

// NewContainer translates the configurations of CreateContainer. They must have passed
// validate.Request and validate.Container. Errors are InvalidArgument and name the field. An image
// volume missing in o is FailedPrecondition.
func NewContainer(
	cfg *runtimeapi.ContainerConfig, pod *runtimeapi.PodSandboxConfig, o ContainerOptions,
) (*Create, error) {
	name := ContainerName(cfg.GetMetadata(), o.Sandbox.Metadata)
	labels, err := containerLabels(name, cfg, pod, o)
	if err != nil {
		return nil, err
	}

	c := &Create{
		Name: name,
		Config: &container.Config{
			// a tag may move between the kubelet's request and our create
			Image:       string(o.Image.ID),
			Entrypoint:  cfg.GetCommand(),
			Cmd:         cfg.GetArgs(),
			WorkingDir:  cfg.GetWorkingDir(),
			Env:         environment(cfg.GetEnvs()),
			Labels:      labels,
			Tty:         cfg.GetTty(),
			OpenStdin:   cfg.GetStdin(),
			StdinOnce:   cfg.GetStdinOnce(),
			StopSignal:  signalName(cfg.GetStopSignal()),
			Healthcheck: &container.HealthConfig{Test: []string{"NONE"}}, // probes are the kubelet's
		},
		Host: &container.HostConfig{
			LogConfig:     container.LogConfig{Type: o.Log.Driver, Config: o.Log.Options},
			RestartPolicy: container.RestartPolicy{Name: container.RestartPolicyDisabled}, // restarts are the kubelet's
			Runtime:       o.Sandbox.Runtime,
			Annotations:   shimGroup(o.Host, o.Sandbox.Name),
		},
	}

	setNamespaces(c, cfg, o)
	setDevices(c, cfg)
	setResources(c, cfg, o)
	if err := setSecurity(c, cfg, o); err != nil {
		return nil, err
	}

	if err := setMounts(c, cfg, o); err != nil {
		return nil, err
	}

	if o.Sandbox.UsesShim() {
		return c, shimContainer(c, cfg, o)
	}

	return c, nil
}

// containerLabels returns the container's record and the labels for other tools.
func containerLabels(
	name string, cfg *runtimeapi.ContainerConfig, pod *runtimeapi.PodSandboxConfig, o ContainerOptions,
) (map[string]string, error) {
	limits, err := kernelLimits("config.linux.resources", cfg.GetLinux().GetResources())
	if err != nil {
		return nil, err
	}

	r := &record{
		Name:        name,
		Labels:      cfg.GetLabels(),
		Annotations: cfg.GetAnnotations(),
		Container: &containerRecord{
			SandboxID:    o.Sandbox.ID,
			Image:        requestedImage(cfg),
			ImageRef:     o.Image.DigestedName(requestedImage(cfg)),
			LogPath:      LogPath(cfg, pod),
			ImageVolumes: imageVolumes(cfg, o),
			Limits:       limits,
			User:         processIdentity(cfg, o),
			Plugins:      o.Plugins,
		},
	}

	facts := map[string]string{
		labelType:      typeContainer,
		labelSandboxID: string(o.Sandbox.ID),
	}
	if p := r.Container.LogPath; p != "" {
		facts[labelLogPath] = p
	}

	return r.write(facts)
}

// requestedImage returns the image's name as written by the user. The kubelet displays and compares
// it.
func requestedImage(cfg *runtimeapi.ContainerConfig) string {
	if s := cfg.GetImage().GetUserSpecifiedImage(); s != "" {
		return s
	}
	return cfg.GetImage().GetImage()
}

func environment(in []*runtimeapi.KeyValue) []string {
	out := make([]string, 0, len(in))
	for _, e := range in {
		out = append(out, e.GetKey()+"="+string(e.GetValue()))
	}
	return out
}

// joinPrefix is the prefix of a container's ID in a namespace mode (Docker API,
// HostConfig.NetworkMode). The new container joins the namespace of that container.
const joinPrefix = "container:"

// setNamespaces joins the pod's namespaces.
func setNamespaces(c *Create, cfg *runtimeapi.ContainerConfig, o ContainerOptions) {
	ns := cfg.GetLinux().GetSecurityContext().GetNamespaceOptions()
	join := joinPrefix + string(o.Sandbox.ID)
	c.Host.NetworkMode, c.Host.IpcMode = container.NetworkMode(join), container.IpcMode(join)
	if o.Sandbox.HostNetwork() {
		c.Host.UTSMode = "host" // network and resolv.conf are the sandbox's
	}
	if o.Sandbox.Namespaces.GetIpc() == runtimeapi.NamespaceMode_NODE {
		c.Host.IpcMode = "host"
	}

	switch ns.GetPid() {
	case runtimeapi.NamespaceMode_POD:
		if ns != nil {
			c.Host.PidMode = container.PidMode(join)
		}

	case runtimeapi.NamespaceMode_NODE:
		c.Host.PidMode = "host"
	case runtimeapi.NamespaceMode_TARGET:
		c.Host.PidMode = container.PidMode(joinPrefix + ns.GetTargetId())
	}

	if o.Host.CgroupVersion == "2" {
		c.Host.CgroupnsMode = container.CgroupnsModePrivate
	}

	if o.Sandbox.HostUsers {
		c.Host.UsernsMode = hostUsers
	}
}

func setSecurity(c *Create, cfg *runtimeapi.ContainerConfig, o ContainerOptions) error {
	sc := cfg.GetLinux().GetSecurityContext()
	c.Config.User = processUser(sc.GetRunAsUser(), sc.GetRunAsGroup(), sc.GetRunAsUsername())
	c.Host.GroupAdd = append(groups(sc.GetSupplementalGroups()), imageGroups(cfg, o)...)
	c.Host.Privileged = sc.GetPrivileged()
	c.Host.ReadonlyRootfs = sc.GetReadonlyRootfs()
	c.Host.CapAdd = capabilities(sc.GetCapabilities().GetAddCapabilities())
	c.Host.CapDrop = capabilities(sc.GetCapabilities().GetDropCapabilities())
	if sc != nil && !sc.GetPrivileged() {
		// The kubelet sends default lists for procMount Default and empty lists for Unmasked. For
		// Docker, nil means its own defaults.
		c.Host.MaskedPaths = append([]string{}, sc.GetMaskedPaths()...)
		c.Host.ReadonlyPaths = append([]string{}, sc.GetReadonlyPaths()...)
	}

	noNewPrivs := "no-new-privileges=false" // explicit: the default in daemon.json may be true
	if sc.GetNoNewPrivs() {
		noNewPrivs = "no-new-privileges"
	}

	c.Host.SecurityOpt = append(c.Host.SecurityOpt, noNewPrivs)
	apparmor, _ := model.AppArmorProfile(sc)
	opts, err := securityOptions(securityInput{
		seccomp:  containerSeccomp(sc),
		apparmor: apparmor,
		selinux:  sc.GetSelinuxOptions(),
		profile:  o.SeccompProfile,
	}, o.Host)
	c.Host.SecurityOpt = append(c.Host.SecurityOpt, opts...)

	return err
}

// setDevices passes device nodes and the names of CDI devices.
func setDevices(c *Create, cfg *runtimeapi.ContainerConfig) {
	for _, d := range cfg.GetDevices() {
		c.Host.Devices = append(c.Host.Devices, container.DeviceMapping{
			PathOnHost:        d.GetHostPath(),
			PathInContainer:   d.GetContainerPath(),
			CgroupPermissions: d.GetPermissions(),
		})
	}

	var names []string
	for _, d := range model.CDIDevices(cfg) {
		names = append(names, d.Name)
	}

	if len(names) > 0 {
		c.Host.DeviceRequests = []container.DeviceRequest{{Driver: "cdi", DeviceIDs: names}}
	}
}
