package spec

import (
	"fmt"
	"path"

	"github.com/containerd/errdefs"
	"github.com/moby/moby/api/types/container"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ContainerOptions are the circumstances in which a container is made.
type ContainerOptions struct {
	Host           Host
	Sandbox        *Sandbox
	Log            LogConfig
	Image          *Image
	SeccompProfile string // the content of the Localhost profile, see SeccompFile
	// those of the configuration, by their index among its mounts
	ImageVolumes map[int]ImageVolume
}

// LogPath is where the kubelet expects a container's log, "" if nowhere.
func LogPath(cfg *runtimeapi.ContainerConfig, pod *runtimeapi.PodSandboxConfig) string {
	if cfg.GetLogPath() == "" || pod.GetLogDirectory() == "" {
		return ""
	}
	return path.Join(pod.GetLogDirectory(), cfg.GetLogPath())
}

// NewContainer translates CreateContainer's configurations, which must have passed Validate. Errors
// are InvalidArgument and name the field.
func NewContainer(
	cfg *runtimeapi.ContainerConfig, pod *runtimeapi.PodSandboxConfig, o ContainerOptions,
) (*Create, error) {
	if len(cfg.GetCommand()) == 0 && len(cfg.GetArgs()) == 0 && !o.Image.Entrypoint && !o.Image.Stale {
		return nil, fmt.Errorf("config.command: image %s has no command of its own: %w", cfg.GetImage().GetImage(),
			errdefs.ErrInvalidArgument)
	}

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

	for _, step := range []func(*Create, *runtimeapi.ContainerConfig, ContainerOptions) error{
		containerNamespaces, containerSecurity, containerMounts, containerDevices, containerResources,
	} {
		if err := step(c, cfg, o); err != nil {
			return nil, err
		}
	}

	return c, nil
}

// containerLabels are the container's record and the labels that other tools read.
func containerLabels(
	name string, cfg *runtimeapi.ContainerConfig, pod *runtimeapi.PodSandboxConfig, o ContainerOptions,
) (map[string]string, error) {
	limits, err := kernelLimits("config.linux.resources", cfg.GetLinux().GetResources(), o.Host)
	if err != nil {
		return nil, err
	}

	r := &record{
		Name:        name,
		Labels:      cfg.GetLabels(),
		Annotations: cfg.GetAnnotations(),
		Container: &containerRecord{
			SandboxID:    o.Sandbox.ID,
			Image:        askedImage(cfg),
			ImageRef:     o.Image.digested(askedImage(cfg)),
			LogPath:      LogPath(cfg, pod),
			ImageVolumes: imageVolumes(cfg, o),
			Limits:       limits,
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

// askedImage is the image's name as the user wrote it, which the kubelet shows and compares.
func askedImage(cfg *runtimeapi.ContainerConfig) string {
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

// joinPrefix precedes the ID of the container whose namespace another one joins (Docker API,
// HostConfig.NetworkMode).
const joinPrefix = "container:"

// containerNamespaces joins the pod's namespaces.
func containerNamespaces(c *Create, cfg *runtimeapi.ContainerConfig, o ContainerOptions) error {
	ns := cfg.GetLinux().GetSecurityContext().GetNamespaceOptions()
	join := joinPrefix + string(o.Sandbox.ID)
	c.Host.NetworkMode, c.Host.IpcMode = container.NetworkMode(join), container.IpcMode(join)
	if o.Sandbox.HostNetwork() {
		c.Host.UTSMode = "host" // the network is the sandbox's, so that its resolv.conf is too
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
		if ns.GetTargetId() == "" {
			return fmt.Errorf("config.linux.security_context.namespace_options.target_id: must not be empty with "+
				"pid mode TARGET: %w", errdefs.ErrInvalidArgument)
		}
		c.Host.PidMode = container.PidMode(joinPrefix + ns.GetTargetId())
	}

	if o.Host.CgroupVersion == "2" {
		c.Host.CgroupnsMode = container.CgroupnsModePrivate
	}

	return joinUsers(c, cfg, o)
}

func containerSecurity(c *Create, cfg *runtimeapi.ContainerConfig, o ContainerOptions) error {
	const field = "config.linux.security_context"
	sc := cfg.GetLinux().GetSecurityContext()
	user, err := processUser(field, sc.GetRunAsUser(), sc.GetRunAsGroup(), sc.GetRunAsUsername())
	if err != nil {
		return err
	}

	if sc.GetSupplementalGroupsPolicy() == runtimeapi.SupplementalGroupsPolicy_Strict {
		return errStrictGroups(field)
	}

	if len(sc.GetCapabilities().GetAddAmbientCapabilities()) > 0 {
		return fmt.Errorf("%s.capabilities.add_ambient_capabilities: Docker cannot set ambient capabilities: %w", field,
			errdefs.ErrInvalidArgument)
	}

	c.Config.User = user
	c.Host.GroupAdd = groups(sc.GetSupplementalGroups())
	c.Host.Privileged = sc.GetPrivileged()
	c.Host.ReadonlyRootfs = sc.GetReadonlyRootfs()
	c.Host.CapAdd = capabilities(sc.GetCapabilities().GetAddCapabilities())
	c.Host.CapDrop = capabilities(sc.GetCapabilities().GetDropCapabilities())
	if sc != nil && !sc.GetPrivileged() {
		// The kubelet sends the default lists for procMount Default and empty ones for Unmasked;
		// for Docker, nil means its own defaults.
		c.Host.MaskedPaths = append([]string{}, sc.GetMaskedPaths()...)
		c.Host.ReadonlyPaths = append([]string{}, sc.GetReadonlyPaths()...)
	}

	noNewPrivs := "no-new-privileges=false" // explicit: the default of daemon.json may be true
	if sc.GetNoNewPrivs() {
		noNewPrivs = "no-new-privileges"
	}

	c.Host.SecurityOpt = append(c.Host.SecurityOpt, noNewPrivs)
	in := securityInput{
		seccomp:  containerSeccomp(sc),
		apparmor: sc.GetApparmor(),
		selinux:  sc.GetSelinuxOptions(),
		profile:  o.SeccompProfile,
	}
	if in.apparmor == nil {
		in.apparmor = legacyProfile(sc.GetApparmorProfile()) //nolint:staticcheck // kubelets before 1.30 send only this
	}

	opts, err := securityOptions(field, in, o.Host)
	c.Host.SecurityOpt = append(c.Host.SecurityOpt, opts...)

	return err
}

// containerDevices passes device nodes, and CDI names to engines that know them.
func containerDevices(c *Create, cfg *runtimeapi.ContainerConfig, o ContainerOptions) error {
	for _, d := range cfg.GetDevices() {
		c.Host.Devices = append(c.Host.Devices, container.DeviceMapping{
			PathOnHost:        d.GetHostPath(),
			PathInContainer:   d.GetContainerPath(),
			CgroupPermissions: d.GetPermissions(),
		})
	}

	devices, err := cdiDevices(cfg)
	if err != nil || len(devices) == 0 {
		return err
	}

	if err := checkCDI(devices, o.Host); err != nil {
		return err
	}

	c.Host.DeviceRequests = []container.DeviceRequest{{Driver: "cdi", DeviceIDs: cdiNames(devices)}}

	return nil
}
