package spec

import (
	"fmt"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

const (
	maxName     = 253     // characters of a pod's name, as Kubernetes allows
	maxText     = 1 << 20 // bytes of any other text that Docker is told
	maxImage    = 1024    // characters of an image's name with host, tag and digest
	maxHostname = 64      // Linux, sethostname(2)
)

// nameParts are what the name scheme and Docker can carry: Docker's names know no other characters,
// and "_" parts the parts.
var nameParts = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9.-]*$`)

// imageRef are the characters of image names (distribution's reference grammar) and IDs.
var imageRef = regexp.MustCompile(`^[a-zA-Z0-9\[][a-zA-Z0-9._:/@+\[\]-]*$`)

// problems collects the first thing wrong with a request.
type problems struct{ err error }

// wrap adds the error of a checked type's constructor.
func (p *problems) wrap(field string, err error) {
	if p.err == nil {
		p.err = fmt.Errorf("%s: %w", field, err)
	}
}

func (p *problems) add(field, format string, args ...any) {
	if p.err == nil {
		p.err = fmt.Errorf("%s: %s: %w", field, fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
	}
}

// required wants a text that is not empty and can be told to Docker.
func (p *problems) required(field, s string) {
	if s == "" {
		p.add(field, "must not be empty")
	}
	p.text(field, s)
}

// text wants valid UTF-8 without NUL and of a bearable length.
func (p *problems) text(field, s string) {
	switch {
	case len(s) > maxText:
		p.add(field, "has %d bytes, at most %d are possible", len(s), maxText)
	case !utf8.ValidString(s):
		p.add(field, "is not valid UTF-8")
	case strings.ContainsRune(s, 0):
		p.add(field, "contains a NUL character")
	}
}

// name wants what can be a part of a container's name.
func (p *problems) name(field, s string) {
	switch {
	case s == "":
		p.add(field, "must not be empty")
	case len(s) > maxName:
		p.add(field, "has %d characters, at most %d are possible", len(s), maxName)
	case !nameParts.MatchString(s):
		p.add(field, "%q must consist of letters, digits, '.' and '-', and begin with a letter or digit", s)
	}
}

// id wants an ID that can stand in a URL of the engine's.
func (p *problems) id(field, s string) {
	p.required(field, s)
	if len(s) > maxName || strings.ContainsFunc(s, func(r rune) bool {
		return r <= ' ' || strings.ContainsRune("/?#%\\", r) || r == 0x7f
	}) {
		p.add(field, "is not an ID")
	}
}

// image wants what can name an image: an ID, or a name with tag or digest.
func (p *problems) image(field, s string) {
	switch {
	case s == "":
		p.add(field, "must not be empty")
	case len(s) > maxImage:
		p.add(field, "has %d characters, at most %d are possible", len(s), maxImage)
	case !imageRef.MatchString(s) || climbs(s):
		p.add(field, "%q is not an image's name or ID", s)
	}
}

func (p *problems) texts(field string, list []string) {
	for i, s := range list {
		p.text(fmt.Sprintf("%s[%d]", field, i), s)
	}
}

func (p *problems) mapped(field string, m map[string]string) {
	for k, v := range m {
		if k == "" {
			p.add(field, "has an empty key")
		}
		p.text(field+" key", k)
		p.text(field+"["+strconv.Quote(k)+"]", v)
	}
}

// absolute wants a clean absolute path.
func (p *problems) absolute(field, s string) {
	p.required(field, s)
	if s != "" && (!path.IsAbs(s) || climbs(s)) {
		p.add(field, "%q must be an absolute path without '..'", s)
	}
}

func climbs(s string) bool {
	for _, part := range strings.Split(s, "/") {
		if part == ".." {
			return true
		}
	}
	return false
}

func enum[T ~int32](p *problems, field string, names map[int32]string, v T) {
	if _, ok := names[int32(v)]; !ok {
		p.add(field, "%d is not a known value", int32(v))
	}
}

// Validate checks a request of either service before anything is done for it. It returns
// InvalidArgument with the field's name, and accepts any message, nil and empty ones included; a
// request that it does not know passes.
func Validate(req any) error {
	p := &problems{}
	switch r := req.(type) {
	case *runtimeapi.RunPodSandboxRequest:
		p.pod("config", r.GetConfig())
		p.text("runtime_handler", r.GetRuntimeHandler())
	case *runtimeapi.CreateContainerRequest:
		p.id("pod_sandbox_id", r.GetPodSandboxId())
		p.container("config", r.GetConfig())
		p.pod("sandbox_config", r.GetSandboxConfig())

	case *runtimeapi.ExecSyncRequest:
		p.id("container_id", r.GetContainerId())
		p.command(r.GetCmd())
		if r.GetTimeout() < 0 {
			p.add("timeout", "%d must not be negative", r.GetTimeout())
		}

	case *runtimeapi.ExecRequest:
		p.id("container_id", r.GetContainerId())
		p.command(r.GetCmd())
		p.streams(r.GetStdin(), r.GetStdout(), r.GetStderr(), r.GetTty())

	case *runtimeapi.AttachRequest:
		p.id("container_id", r.GetContainerId())
		p.streams(r.GetStdin(), r.GetStdout(), r.GetStderr(), r.GetTty())
	case *runtimeapi.PortForwardRequest:
		p.id("pod_sandbox_id", r.GetPodSandboxId())
		for i, port := range r.GetPort() {
			p.port(fmt.Sprintf("port[%d]", i), port)
		}

	case *runtimeapi.UpdateContainerResourcesRequest:
		p.id("container_id", r.GetContainerId())
		p.resources("linux", r.GetLinux())
		p.memoryLimits("linux", r.GetLinux(), false)

	case *runtimeapi.UpdatePodSandboxResourcesRequest:
		p.id("pod_sandbox_id", r.GetPodSandboxId())
		p.resources("overhead", r.GetOverhead())
		p.resources("resources", r.GetResources())

	case *runtimeapi.UpdateRuntimeConfigRequest:
		p.text("runtime_config.network_config.pod_cidr", r.GetRuntimeConfig().GetNetworkConfig().GetPodCidr())
	case *runtimeapi.PullImageRequest:
		p.image("image.image", r.GetImage().GetImage())
	case *runtimeapi.ImageStatusRequest:
		p.image("image.image", r.GetImage().GetImage())
	case *runtimeapi.RemoveImageRequest:
		p.image("image.image", r.GetImage().GetImage())
	default:
		p.single(req)
	}

	return p.err
}

// single checks the requests that have one ID, or filters.
func (p *problems) single(req any) {
	if r, ok := req.(interface{ GetPodSandboxId() string }); ok {
		p.id("pod_sandbox_id", r.GetPodSandboxId())
	}
	if r, ok := req.(interface{ GetContainerId() string }); ok {
		p.id("container_id", r.GetContainerId())
	}
	if r, ok := req.(interface{ GetTimeout() int64 }); ok && r.GetTimeout() < 0 {
		p.add("timeout", "%d must not be negative", r.GetTimeout())
	}
}

func (p *problems) command(cmd []string) {
	if len(cmd) == 0 {
		p.add("cmd", "must not be empty")
		return
	}
	p.required("cmd[0]", cmd[0])
	p.texts("cmd", cmd)
}

func (p *problems) streams(stdin, stdout, stderr, tty bool) {
	if !stdin && !stdout && !stderr {
		p.add("stdin, stdout, stderr", "one of them must be set")
	}
	if tty && stderr {
		p.add("stderr", "a terminal has no separate stderr")
	}
}

func (p *problems) port(field string, v int32) {
	if v < 1 || v > 65535 {
		p.add(field, "%d is not a port (1 to 65535)", v)
	}
}

// pod checks a sandbox configuration.
func (p *problems) pod(field string, c *runtimeapi.PodSandboxConfig) {
	if c.GetMetadata() == nil {
		p.add(field+".metadata", "must be set")
		return
	}

	p.name(field+".metadata.name", c.GetMetadata().GetName())
	p.name(field+".metadata.namespace", c.GetMetadata().GetNamespace())
	p.name(field+".metadata.uid", c.GetMetadata().GetUid())
	if len(c.GetHostname()) > maxHostname {
		p.add(field+".hostname", "has %d characters, at most %d are possible", len(c.GetHostname()), maxHostname)
	}
	if c.GetHostname() != "" && !nameParts.MatchString(c.GetHostname()) {
		p.add(field+".hostname", "%q is not a host name", c.GetHostname())
	}
	if c.GetLogDirectory() != "" {
		p.absolute(field+".log_directory", c.GetLogDirectory())
	}

	for i, m := range c.GetPortMappings() {
		f := fmt.Sprintf("%s.port_mappings[%d]", field, i)
		enum(p, f+".protocol", runtimeapi.Protocol_name, m.GetProtocol())
		if m.GetHostPort() < 0 || m.GetHostPort() > 65535 {
			p.add(f+".host_port", "%d is not a port", m.GetHostPort())
		}
		if m.GetHostPort() > 0 {
			p.port(f+".container_port", m.GetContainerPort())
		}
	}

	p.mapped(field+".labels", c.GetLabels())
	p.mapped(field+".annotations", c.GetAnnotations())
	p.mapped(field+".linux.sysctls", c.GetLinux().GetSysctls())
	p.resources(field+".linux.overhead", c.GetLinux().GetOverhead())
	p.resources(field+".linux.resources", c.GetLinux().GetResources())
	p.lines(field+".dns_config.servers", c.GetDnsConfig().GetServers())
	p.lines(field+".dns_config.searches", c.GetDnsConfig().GetSearches())
	p.lines(field+".dns_config.options", c.GetDnsConfig().GetOptions())
	if c.GetWindows() != nil {
		p.add(field+".windows", "this node runs Linux")
	}

	sc := c.GetLinux().GetSecurityContext()
	p.namespaces(field+".linux.security_context.namespace_options", sc.GetNamespaceOptions())
	if sc.GetNamespaceOptions().GetPid() == runtimeapi.NamespaceMode_TARGET {
		p.add(field+".linux.security_context.namespace_options.pid", "TARGET is for containers")
	}

	p.profile(field+".linux.security_context.seccomp", sc.GetSeccomp())
	p.legacyProfile(field+".linux.security_context.seccomp_profile_path",
		sc.GetSeccompProfilePath()) //nolint:staticcheck // old kubelets
	p.profile(field+".linux.security_context.apparmor", sc.GetApparmor())
	if parent := c.GetLinux().GetCgroupParent(); parent != "" {
		p.text(field+".linux.cgroup_parent", parent)
		if climbs(parent) {
			p.add(field+".linux.cgroup_parent", "%q must not contain '..'", parent)
		}
	}
}

// lines wants words that each can stand in resolv.conf without making another line.
func (p *problems) lines(field string, list []string) {
	for i, s := range list {
		f := fmt.Sprintf("%s[%d]", field, i)
		p.required(f, s)
		if strings.ContainsAny(s, "\n\r") {
			p.add(f, "contains a line break")
		}
	}
}

func (p *problems) namespaces(field string, o *runtimeapi.NamespaceOption) {
	enum(p, field+".network", runtimeapi.NamespaceMode_name, o.GetNetwork())
	enum(p, field+".pid", runtimeapi.NamespaceMode_name, o.GetPid())
	enum(p, field+".ipc", runtimeapi.NamespaceMode_name, o.GetIpc())
	if o.GetPid() == runtimeapi.NamespaceMode_TARGET {
		p.id(field+".target_id", o.GetTargetId())
	}

	p.shared(field+".network", o.GetNetwork())
	p.shared(field+".ipc", o.GetIpc())
	if u := o.GetUsernsOptions(); u != nil && u.GetMode() == runtimeapi.NamespaceMode_POD {
		p.add(field+".userns_options", "user namespaces are not supported on this runtime; set hostUsers: true")
	}
}

// shared wants a mode of what all containers of a pod share (CRI NamespaceOption: network and ipc
// are POD or NODE).
func (p *problems) shared(field string, m runtimeapi.NamespaceMode) {
	if m == runtimeapi.NamespaceMode_CONTAINER || m == runtimeapi.NamespaceMode_TARGET {
		p.add(field, "%v is not possible, only POD and NODE are", m)
	}
}

func (p *problems) profile(field string, s *runtimeapi.SecurityProfile) {
	enum(p, field+".profile_type", runtimeapi.SecurityProfile_ProfileType_name, s.GetProfileType())
	if s.GetProfileType() == runtimeapi.SecurityProfile_Localhost {
		p.required(field+".localhost_ref", s.GetLocalhostRef())
	}
}

// container checks a container's configuration.
func (p *problems) container(field string, c *runtimeapi.ContainerConfig) {
	if c.GetMetadata() == nil {
		p.add(field+".metadata", "must be set")
		return
	}

	p.name(field+".metadata.name", c.GetMetadata().GetName())
	if c.GetMetadata().GetName() == pauseName {
		p.add(field+".metadata.name", "%q is kept for the sandbox", pauseName)
	}
	if c.GetWindows() != nil {
		p.add(field+".windows", "this node runs Linux")
	}

	p.image(field+".image.image", c.GetImage().GetImage())
	if lp := c.GetLogPath(); lp != "" {
		p.text(field+".log_path", lp)
		if path.IsAbs(lp) || climbs(lp) {
			p.add(field+".log_path", "%q must be relative to the pod's log directory and stay within it", lp)
		}
	}

	p.texts(field+".command", c.GetCommand())
	p.texts(field+".args", c.GetArgs())
	p.text(field+".working_dir", c.GetWorkingDir())
	for i, e := range c.GetEnvs() {
		f := fmt.Sprintf("%s.envs[%d]", field, i)
		p.required(f+".key", e.GetKey())
		name, _, ok := strings.Cut(e.GetKey(), "=")
		if ok { // what follows may be a value, which is not repeated
			p.add(f+".key", "%q is followed by '='", name)
		}
		p.text(fmt.Sprintf("%s.value (%q)", f, name), string(e.GetValue()))
	}

	for i, m := range c.GetMounts() {
		p.mount(fmt.Sprintf("%s.mounts[%d]", field, i), m)
	}

	for i, d := range c.GetDevices() {
		f := fmt.Sprintf("%s.devices[%d]", field, i)
		p.absolute(f+".host_path", d.GetHostPath())
		p.absolute(f+".container_path", d.GetContainerPath())
		if strings.Trim(d.GetPermissions(), "rwm") != "" {
			p.add(f+".permissions", "%q may hold only r, w and m", d.GetPermissions())
		}
	}

	p.mapped(field+".labels", c.GetLabels())
	p.mapped(field+".annotations", c.GetAnnotations())
	if _, err := cdiDevices(c); err != nil && p.err == nil {
		p.err = err // it names the field
	}

	enum(p, field+".stop_signal", runtimeapi.Signal_name, c.GetStopSignal())
	p.resources(field+".linux.resources", c.GetLinux().GetResources())
	p.memoryLimits(field+".linux.resources", c.GetLinux().GetResources(), true)
	p.containerSecurity(field+".linux.security_context", c.GetLinux().GetSecurityContext())
}

func (p *problems) containerSecurity(field string, sc *runtimeapi.LinuxContainerSecurityContext) {
	p.namespaces(field+".namespace_options", sc.GetNamespaceOptions())
	p.profile(field+".seccomp", sc.GetSeccomp())
	p.profile(field+".apparmor", sc.GetApparmor())
	p.legacyProfile(field+".seccomp_profile_path", sc.GetSeccompProfilePath()) //nolint:staticcheck // old kubelets
	p.legacyProfile(field+".apparmor_profile", sc.GetApparmorProfile())        //nolint:staticcheck // old kubelets
	p.text(field+".run_as_username", sc.GetRunAsUsername())
	if sc.GetRunAsUser().GetValue() < 0 {
		p.add(field+".run_as_user", "must not be negative")
	}
	if sc.GetRunAsGroup().GetValue() < 0 {
		p.add(field+".run_as_group", "must not be negative")
	}

	enum(p, field+".supplemental_groups_policy", runtimeapi.SupplementalGroupsPolicy_name,
		sc.GetSupplementalGroupsPolicy())
	for i, c := range slices.Concat(sc.GetCapabilities().GetAddCapabilities(),
		sc.GetCapabilities().GetDropCapabilities()) {
		if !nameParts.MatchString(strings.ReplaceAll(c, "_", "")) {
			p.add(fmt.Sprintf("%s.capabilities[%d]", field, i), "%q is not a capability", c)
		}
	}
}

func (p *problems) resources(field string, r *runtimeapi.LinuxContainerResources) {
	for _, f := range []struct {
		name string
		v    int64
		low  int64
	}{
		{"cpu_period", r.GetCpuPeriod(), 0}, {"cpu_quota", r.GetCpuQuota(), -1}, {"cpu_shares", r.GetCpuShares(), 0},
		{"memory_limit_in_bytes", r.GetMemoryLimitInBytes(), -1},
		{"memory_swap_limit_in_bytes", r.GetMemorySwapLimitInBytes(), -1},
	} {
		if f.v < f.low {
			p.add(field+"."+f.name, "%d must not be below %d", f.v, f.low)
		}
	}

	if s := r.GetOomScoreAdj(); s < -1000 || s > 1000 {
		p.add(field+".oom_score_adj", "%d is not between -1000 and 1000", s)
	}

	p.text(field+".cpuset_cpus", r.GetCpusetCpus())
	p.text(field+".cpuset_mems", r.GetCpusetMems())
	for i, l := range r.GetHugepageLimits() {
		if _, err := model.ParsePageSize(l.GetPageSize()); err != nil {
			p.wrap(fmt.Sprintf("%s.hugepage_limits[%d].page_size", field, i), err)
		}
	}

	for k, v := range r.GetUnified() {
		if _, err := model.ParseUnifiedKey(k); err != nil {
			p.wrap(field+".unified", err)
			continue
		}
		p.required(field+".unified["+strconv.Quote(k)+"]", v)
	}
}
