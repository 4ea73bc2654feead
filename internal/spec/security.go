package spec

import (
	"fmt"
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
	var opts []string
	switch in.seccomp.GetProfileType() {
	case runtimeapi.SecurityProfile_Unconfined:
		opts = append(opts, "seccomp=unconfined")
	case runtimeapi.SecurityProfile_Localhost:
		if in.profile == "" {
			return nil, fmt.Errorf("%s.seccomp: profile %q is empty: %w", field, in.seccomp.GetLocalhostRef(), errdefs.ErrInvalidArgument)
		}
		opts = append(opts, "seccomp="+in.profile)
	}
	switch in.apparmor.GetProfileType() {
	case runtimeapi.SecurityProfile_Unconfined:
		if h.Has("apparmor") {
			opts = append(opts, "apparmor=unconfined")
		}
	case runtimeapi.SecurityProfile_Localhost:
		if !h.Has("apparmor") {
			return nil, fmt.Errorf("%s.apparmor: profile %q: AppArmor is not enabled on this node: %w", field, in.apparmor.GetLocalhostRef(), errdefs.ErrInvalidArgument)
		}
		opts = append(opts, "apparmor="+in.apparmor.GetLocalhostRef())
	}
	for _, o := range []struct{ key, value string }{
		{"user", in.selinux.GetUser()}, {"role", in.selinux.GetRole()}, {"type", in.selinux.GetType()}, {"level", in.selinux.GetLevel()},
	} {
		if o.value != "" {
			opts = append(opts, "label="+o.key+":"+o.value)
		}
	}
	return opts, nil
}

// seccompProfile is the profile asked for, by the new field or by the path that kubelets before 1.19 send.
func seccompProfile(p *runtimeapi.SecurityProfile, deprecated string) *runtimeapi.SecurityProfile {
	if p != nil {
		return p
	}
	return legacyProfile(deprecated)
}

// legacyProfile reads the string forms runtime/default, docker/default, unconfined and localhost/<ref>.
func legacyProfile(s string) *runtimeapi.SecurityProfile {
	switch ref, local := strings.CutPrefix(s, "localhost/"); {
	case local:
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Localhost, LocalhostRef: ref}
	case s == "unconfined":
		return &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_Unconfined}
	}
	return nil // runtime/default, docker/default and "": the engine's own
}

// SeccompFile is the file whose content NewContainer needs as SeccompProfile, "" if none.
func SeccompFile(cfg *runtimeapi.ContainerConfig) string {
	sc := cfg.GetLinux().GetSecurityContext()
	return seccompFile(seccompProfile(sc.GetSeccomp(), sc.GetSeccompProfilePath())) //nolint:staticcheck // old kubelets send only the path
}

// SandboxSeccompFile is the file whose content NewSandbox needs as SeccompProfile, "" if none.
func SandboxSeccompFile(cfg *runtimeapi.PodSandboxConfig) string {
	sc := cfg.GetLinux().GetSecurityContext()
	return seccompFile(seccompProfile(sc.GetSeccomp(), sc.GetSeccompProfilePath())) //nolint:staticcheck // old kubelets send only the path
}

func seccompFile(p *runtimeapi.SecurityProfile) string {
	if p.GetProfileType() != runtimeapi.SecurityProfile_Localhost {
		return ""
	}
	return strings.TrimPrefix(p.GetLocalhostRef(), "localhost/")
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
		return "", fmt.Errorf("%s.run_as_group: needs run_as_user or run_as_username: %w", field, errdefs.ErrInvalidArgument)
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
	return fmt.Errorf("%s.supplemental_groups_policy: Strict is not supported on this runtime; use Merge: %w", field, errdefs.ErrInvalidArgument)
}

// capabilities are Docker's names, which have the prefix CAP_ optional, as CRI's have none.
func capabilities(in []string) []string {
	var out []string
	for _, c := range in {
		out = append(out, strings.TrimPrefix(strings.ToUpper(c), "CAP_"))
	}
	return out
}
