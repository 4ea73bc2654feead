package validate

import (
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
	"cri-dockerd/internal/text"
)

// container checks a container's configuration.
func (p *problems) container(field string, c *runtimeapi.ContainerConfig) {
	if c.GetMetadata() == nil {
		p.add(field+".metadata", "must be set")
		return
	}

	p.name(field+".metadata.name", c.GetMetadata().GetName())
	if c.GetMetadata().GetName() == model.PauseName {
		p.add(field+".metadata.name", "%q is reserved for the sandbox", model.PauseName)
	}
	if c.GetWindows() != nil {
		p.add(field+".windows", "this node runs Linux")
	}

	p.image(field+".image.image", c.GetImage().GetImage())
	if lp := c.GetLogPath(); lp != "" {
		p.text(field+".log_path", lp)
		if path.IsAbs(lp) || hasDotDot(lp) {
			p.add(field+".log_path", "%q must be relative to the pod's log directory and stay within it", lp)
		}
	}

	p.texts(field+".command", c.GetCommand())
	p.texts(field+".args", c.GetArgs())
	p.text(field+".working_dir", c.GetWorkingDir())
	p.environment(field+".envs", c.GetEnvs())
	for i, m := range c.GetMounts() {
		p.mount(fmt.Sprintf("%s.mounts[%d]", field, i), m)
	}

	p.devices(field+".devices", c.GetDevices())
	p.textMap(field+".labels", c.GetLabels())
	p.textMap(field+".annotations", c.GetAnnotations())
	p.cdiNames(c)
	enum(p, field+".stop_signal", runtimeapi.Signal_name, c.GetStopSignal())
	p.resources(field+".linux.resources", c.GetLinux().GetResources())
	p.memoryLimits(field+".linux.resources", c.GetLinux().GetResources(), true)
	p.containerSecurity(field+".linux.security_context", c.GetLinux().GetSecurityContext())
}

// environment checks environment variables. Errors never contain a value.
func (p *problems) environment(field string, envs []*runtimeapi.KeyValue) {
	for i, e := range envs {
		f := fmt.Sprintf("%s[%d]", field, i)
		p.required(f+".key", e.GetKey())
		name, _, ok := strings.Cut(e.GetKey(), "=")
		if ok {
			p.add(f+".key", "%q is followed by '='", name)
		}
		p.text(fmt.Sprintf("%s.value (%q)", f, name), string(e.GetValue()))
	}
}

func (p *problems) devices(field string, devices []*runtimeapi.Device) {
	for i, d := range devices {
		f := fmt.Sprintf("%s[%d]", field, i)
		p.absolutePath(f+".host_path", d.GetHostPath())
		p.absolutePath(f+".container_path", d.GetContainerPath())
		if strings.Trim(d.GetPermissions(), "rwm") != "" {
			p.add(f+".permissions", "%q must consist of r, w and m", d.GetPermissions())
		}
	}
}

// cdiPattern is the grammar of a CDI device's name: vendor/class=device (CDI specification 0.8,
// "kind" and "devices").
var cdiPattern = regexp.MustCompile(`^[A-Za-z]([A-Za-z0-9_.-]*[A-Za-z0-9])?/[A-Za-z]([A-Za-z0-9_-]*[A-Za-z0-9])?` +
	`=[A-Za-z0-9]([A-Za-z0-9_.:-]*[A-Za-z0-9])?$`)

// cdiNames checks the names of CDI devices. A container must not start without its device.
func (p *problems) cdiNames(c *runtimeapi.ContainerConfig) {
	for _, d := range model.CDIDevices(c) {
		if !cdiPattern.MatchString(d.Name) {
			p.add(d.Field, "%q is not the name of a CDI device (vendor/class=device)", text.Clean(d.Name, maxName))
		}
	}
}

func (p *problems) containerSecurity(field string, sc *runtimeapi.LinuxContainerSecurityContext) {
	p.namespaces(field+".namespace_options", sc.GetNamespaceOptions())
	p.profile(field+".seccomp", sc.GetSeccomp())
	p.profile(field+".apparmor", sc.GetApparmor())
	p.profileString(field+".seccomp_profile_path", sc.GetSeccompProfilePath()) //nolint:staticcheck // old kubelets
	p.profileString(field+".apparmor_profile", sc.GetApparmorProfile())        //nolint:staticcheck // old kubelets
	appArmor, name := model.AppArmorProfile(sc)
	p.appArmorName(field+"."+name, appArmor)
	p.text(field+".run_as_username", sc.GetRunAsUsername())
	if sc.GetRunAsUser().GetValue() < 0 {
		p.add(field+".run_as_user", "must not be negative")
	}
	if sc.GetRunAsGroup().GetValue() < 0 {
		p.add(field+".run_as_group", "must not be negative")
	}

	enum(p, field+".supplemental_groups_policy", runtimeapi.SupplementalGroupsPolicy_name,
		sc.GetSupplementalGroupsPolicy())
	p.user(field, securityContext{
		user:     sc.GetRunAsUser(),
		group:    sc.GetRunAsGroup(),
		username: sc.GetRunAsUsername(),
		policy:   sc.GetSupplementalGroupsPolicy(),
		groups:   sc.GetSupplementalGroups(),
	})
	p.capabilities(field+".capabilities", sc.GetCapabilities())
}

func (p *problems) capabilities(field string, c *runtimeapi.Capability) {
	for i, name := range slices.Concat(c.GetAddCapabilities(), c.GetDropCapabilities(), c.GetAddAmbientCapabilities()) {
		if !namePattern.MatchString(strings.ReplaceAll(name, "_", "")) {
			p.add(fmt.Sprintf("%s[%d]", field, i), "%q is not a capability", name)
		}
	}
}
