package translate

import (
	"cmp"
	"slices"
	"strings"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"cri-dockerd/internal/model"
)

// imageUser returns the user of a container's first process as the image knows it, and false if the
// image's users are unknown or lack the user. Docker rejects a missing user at the start.
func imageUser(cfg *runtimeapi.ContainerConfig, o ContainerOptions) (model.User, bool) {
	if o.Accounts == nil {
		return model.User{}, false
	}

	u, err := o.Accounts.Resolve(userSpec(cfg, o))

	return u, err == nil
}

// userSpec returns the user of a container in Docker's form.
func userSpec(cfg *runtimeapi.ContainerConfig, o ContainerOptions) string {
	sc := cfg.GetLinux().GetSecurityContext()
	return cmp.Or(processUser(sc.GetRunAsUser(), sc.GetRunAsGroup(), sc.GetRunAsUsername()), o.Image.User)
}

// isStrict reports whether the groups of the image do not count (CRI SupplementalGroupsPolicy).
func isStrict(cfg *runtimeapi.ContainerConfig) bool {
	return cfg.GetLinux().GetSecurityContext().GetSupplementalGroupsPolicy() ==
		runtimeapi.SupplementalGroupsPolicy_Strict
}

// imageGroups returns the groups that the image has for the user, for Docker's GroupAdd. Docker
// itself adds them, unless the user has an explicit primary group.
func imageGroups(cfg *runtimeapi.ContainerConfig, o ContainerOptions) []string {
	_, _, isExplicit := strings.Cut(userSpec(cfg, o), ":")
	u, ok := imageUser(cfg, o)
	if !ok || !isExplicit || isStrict(cfg) {
		return nil
	}

	requested := cfg.GetLinux().GetSecurityContext().GetSupplementalGroups()
	added := func(id int64) bool { return id == u.GID || slices.Contains(requested, id) }

	return groups(slices.DeleteFunc(slices.Clone(u.Groups), added))
}

// processIdentity returns the user and all groups of a container's first process, nil if they are
// unknown.
func processIdentity(cfg *runtimeapi.ContainerConfig, o ContainerOptions) *model.User {
	u, ok := imageUser(cfg, o)
	if !ok {
		return nil
	}

	all := []int64{u.GID}
	if !isStrict(cfg) {
		all = append(all, u.Groups...)
	}
	all = append(all, cfg.GetLinux().GetSecurityContext().GetSupplementalGroups()...)

	u.Groups = nil
	for _, id := range all {
		if !slices.Contains(u.Groups, id) {
			u.Groups = append(u.Groups, id)
		}
	}

	return &u
}
