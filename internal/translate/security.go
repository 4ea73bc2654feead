package translate

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// securityInput holds the profiles of a sandbox or container.
type securityInput struct {
	seccomp, apparmor *runtimeapi.SecurityProfile
	selinux           *runtimeapi.SELinuxOption
	profile           string // content of the Localhost seccomp profile
}

// securityOptions returns Docker's --security-opt values.
func securityOptions(in securityInput, h model.Host) ([]string, error) {
	opts, err := seccompOptions(in, h)
	if err != nil {
		return nil, err
	}

	switch in.apparmor.GetProfileType() {
	case runtimeapi.SecurityProfile_Unconfined:
		if h.Has("apparmor") {
			opts = append(opts, "apparmor=unconfined")
		}

	case runtimeapi.SecurityProfile_Localhost:
		opts = append(opts, "apparmor="+model.LocalhostRef(in.apparmor))
	}

	for _, o := range []struct{ key, value string }{
		{"user", in.selinux.GetUser()},
		{"role", in.selinux.GetRole()},
		{"type", in.selinux.GetType()},
		{"level", in.selinux.GetLevel()},
	} {
		if o.value != "" {
			opts = append(opts, "label="+o.key+":"+o.value)
		}
	}

	return opts, nil
}

// seccompOptions returns Docker's --security-opt values for seccomp. RuntimeDefault, the engine's
// own profile, needs none. An engine without seccomp gets none for Unconfined: all its containers
// are unconfined. An empty Localhost profile is InvalidArgument.
func seccompOptions(in securityInput, h model.Host) ([]string, error) {
	switch in.seccomp.GetProfileType() {
	case runtimeapi.SecurityProfile_Unconfined:
		if !h.Has("seccomp") {
			return nil, nil
		}
		return []string{"seccomp=unconfined"}, nil

	case runtimeapi.SecurityProfile_Localhost:
		if in.profile == "" {
			return nil, fmt.Errorf("config.linux.security_context.seccomp: profile %q is empty: %w",
				in.seccomp.GetLocalhostRef(), errdefs.ErrInvalidArgument)
		}
		return []string{"seccomp=" + in.profile}, nil
	}

	return nil, nil
}

// seccompProfile returns the effective profile. p is the request's profile, path its string form
// from kubelets before 1.19. Unset means unconfined (CRI LinuxContainerSecurityContext.seccomp),
// and a privileged container ignores its profile. Docker alone would apply its default profile to
// the former, and Engine 29 a Localhost profile to the latter.
func seccompProfile(p *runtimeapi.SecurityProfile, path string, privileged bool) *runtimeapi.SecurityProfile {
	if p == nil {
		p, _ = model.ParseProfile(path) // validate.Request rejects unknown strings
	}
	if p == nil || privileged {
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}
	}
	return p
}

// SeccompFile returns the file of a container's seccomp profile, "" for none. NewContainer needs
// its content.
func SeccompFile(cfg *runtimeapi.ContainerConfig) string {
	return model.LocalhostRef(containerSeccomp(cfg.GetLinux().GetSecurityContext()))
}

// containerSeccomp returns the effective seccomp profile of a container.
func containerSeccomp(sc *runtimeapi.LinuxContainerSecurityContext) *runtimeapi.SecurityProfile {
	path := sc.GetSeccompProfilePath() //nolint:staticcheck // old kubelets send only the path
	return seccompProfile(sc.GetSeccomp(), path, sc.GetPrivileged())
}

// sandboxSeccomp returns the effective seccomp profile of a pause container.
func sandboxSeccomp(sc *runtimeapi.LinuxSandboxSecurityContext) *runtimeapi.SecurityProfile {
	path := sc.GetSeccompProfilePath() //nolint:staticcheck // old kubelets send only the path
	return seccompProfile(sc.GetSeccomp(), path, sc.GetPrivileged())
}

// SandboxSeccompFile returns the file of a sandbox's seccomp profile, "" for none. NewSandbox needs
// its content.
func SandboxSeccompFile(cfg *runtimeapi.PodSandboxConfig) string {
	return model.LocalhostRef(sandboxSeccomp(cfg.GetLinux().GetSecurityContext()))
}

// processUser returns Docker's user[:group]. validate.Request rejects a group without a user.
func processUser(uid, gid *runtimeapi.Int64Value, username string) string {
	user := username
	if uid != nil {
		user = strconv.FormatInt(uid.GetValue(), 10)
	}
	if gid == nil {
		return user
	}

	return user + ":" + strconv.FormatInt(gid.GetValue(), 10)
}

func groups(ids []int64) []string {
	var out []string
	for _, g := range ids {
		out = append(out, strconv.FormatInt(g, 10))
	}
	return out
}

// capabilities returns names in Docker's form: upper case, without the optional prefix CAP_.
func capabilities(in []string) []string {
	var out []string
	for _, c := range in {
		out = append(out, strings.TrimPrefix(strings.ToUpper(c), "CAP_"))
	}
	return out
}
