package spec

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// securityInput gathers the profiles of a sandbox or container.
type securityInput struct {
	seccomp, apparmor *runtimeapi.SecurityProfile
	selinux           *runtimeapi.SELinuxOption
	profile           string // content of a Localhost seccomp profile
}

// securityOptions are Docker's --security-opt values.
func securityOptions(field string, in securityInput, h Host) ([]string, error) {
	opts, err := seccompOptions(field, in, h)
	if err != nil {
		return nil, err
	}

	switch in.apparmor.GetProfileType() {
	case runtimeapi.SecurityProfile_Unconfined:
		if h.Has("apparmor") {
			opts = append(opts, "apparmor=unconfined")
		}

	case runtimeapi.SecurityProfile_Localhost:
		if !h.Has("apparmor") {
			return nil, fmt.Errorf("%s.apparmor: profile %q: AppArmor is not enabled on this node: %w", field,
				in.apparmor.GetLocalhostRef(), errdefs.ErrInvalidArgument)
		}
		opts = append(opts, "apparmor="+in.apparmor.GetLocalhostRef())
	}

	for _, o := range []struct{ key, value string }{
		{"user", in.selinux.GetUser()}, {"role", in.selinux.GetRole()}, {"type", in.selinux.GetType()},
		{"level", in.selinux.GetLevel()},
	} {
		if o.value != "" {
			opts = append(opts, "label="+o.key+":"+o.value)
		}
	}

	return opts, nil
}

// seccompOptions are Docker's --security-opt values for seccomp. RuntimeDefault is the engine's own
// profile and needs none. An engine without seccomp is told nothing: all its containers are
// unconfined.
func seccompOptions(field string, in securityInput, h Host) ([]string, error) {
	switch in.seccomp.GetProfileType() {
	case runtimeapi.SecurityProfile_Unconfined:
		if !h.Has("seccomp") {
			return nil, nil
		}
		return []string{"seccomp=unconfined"}, nil

	case runtimeapi.SecurityProfile_Localhost:
		if in.profile == "" {
			return nil, fmt.Errorf("%s.seccomp: profile %q is empty: %w", field, in.seccomp.GetLocalhostRef(),
				errdefs.ErrInvalidArgument)
		}
		return []string{"seccomp=" + in.profile}, nil
	}

	return nil, nil
}

// seccompProfile returns the profile that applies. p is the request's profile, path the string that
// kubelets before 1.19 send in its place. A profile that is not set means unconfined (CRI
// LinuxContainerSecurityContext.seccomp), and a privileged container ignores its profile. Docker
// alone would apply its default profile to the former, and Engine 29 a Localhost one to the latter.
func seccompProfile(p *runtimeapi.SecurityProfile, path string, privileged bool) *runtimeapi.SecurityProfile {
	if p == nil {
		p = legacyProfile(path)
	}
	if p == nil || privileged {
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}
	}
	return p
}

// legacyProfile reads the string forms of a seccomp or AppArmor profile: runtime/default,
// docker/default, unconfined and localhost/<ref>. It returns nil for "", which is not set. Validate
// refuses all others.
func legacyProfile(s string) *runtimeapi.SecurityProfile {
	ref, local := strings.CutPrefix(s, localhostPrefix)
	switch {
	case local:
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: ref}
	case s == "unconfined":
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}
	case s == "":
		return nil
	}

	return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}
}

// localhostPrefix begins the string form of a profile on this node.
const localhostPrefix = "localhost/"

// SeccompFile is the file whose content NewContainer needs as SeccompProfile, "" if none.
func SeccompFile(cfg *runtimeapi.ContainerConfig) string {
	sc := cfg.GetLinux().GetSecurityContext()
	return seccompFile(containerSeccomp(sc))
}

// containerSeccomp is the seccomp profile of a container.
func containerSeccomp(sc *runtimeapi.LinuxContainerSecurityContext) *runtimeapi.SecurityProfile {
	path := sc.GetSeccompProfilePath() //nolint:staticcheck // old kubelets send only the path
	return seccompProfile(sc.GetSeccomp(), path, sc.GetPrivileged())
}

// sandboxSeccomp is the seccomp profile of a pause.
func sandboxSeccomp(sc *runtimeapi.LinuxSandboxSecurityContext) *runtimeapi.SecurityProfile {
	path := sc.GetSeccompProfilePath() //nolint:staticcheck // old kubelets send only the path
	return seccompProfile(sc.GetSeccomp(), path, sc.GetPrivileged())
}

// SandboxSeccompFile is the file whose content NewSandbox needs as SeccompProfile, "" if none.
func SandboxSeccompFile(cfg *runtimeapi.PodSandboxConfig) string {
	sc := cfg.GetLinux().GetSecurityContext()
	return seccompFile(sandboxSeccomp(sc))
}

func seccompFile(p *runtimeapi.SecurityProfile) string {
	if p.GetProfileType() != runtimeapi.SecurityProfile_Localhost {
		return ""
	}
	return strings.TrimPrefix(p.GetLocalhostRef(), localhostPrefix)
}

// processUser is Docker's user[:group].
func processUser(field string, uid, gid *runtimeapi.Int64Value, username string) (string, error) {
	user := username
	if uid != nil {
		user = strconv.FormatInt(uid.GetValue(), 10)
	}
	if gid == nil {
		return user, nil
	}

	if user == "" {
		return "", fmt.Errorf("%s.run_as_group: needs run_as_user or run_as_username: %w", field,
			errdefs.ErrInvalidArgument)
	}

	return user + ":" + strconv.FormatInt(gid.GetValue(), 10), nil
}

func groups(ids []int64) []string {
	var out []string
	for _, g := range ids {
		out = append(out, strconv.FormatInt(g, 10))
	}
	return out
}

func errStrictGroups(field string) error {
	return fmt.Errorf("%s.supplemental_groups_policy: Strict is not supported on this runtime; use Merge: %w", field,
		errdefs.ErrInvalidArgument)
}

// capabilities are Docker's names, which have the prefix CAP_ optional, as CRI's have none.
func capabilities(in []string) []string {
	var out []string
	for _, c := range in {
		out = append(out, strings.TrimPrefix(strings.ToUpper(c), "CAP_"))
	}
	return out
}

// legacyProfile checks the string form of a profile. An unknown one must not run as another.
func (p *problems) legacyProfile(field, s string) {
	switch ref, local := strings.CutPrefix(s, localhostPrefix); {
	case local:
		p.required(field, ref)
	case !slices.Contains([]string{"", "unconfined", "runtime/default", "docker/default"}, s):
		p.add(field, "%q is not unconfined, runtime/default, docker/default or localhost/<profile>", s)
	}
}
