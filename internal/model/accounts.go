package model

import (
	"bufio"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// Bounds for the files of an image. Longer lines and larger files are DataLoss.
const (
	MaxAccountFile = 16 << 20 // bytes
	maxAccountLine = 1 << 20  // bytes
	maxID          = 1<<31 - 1
)

// Accounts are the users and groups of an image, from its /etc/passwd and /etc/group (passwd(5),
// group(5)). The zero value is those of an image without these files.
type Accounts struct {
	users  []account
	groups []account
}

// account is a user with the primary group, or a group with its members.
type account struct {
	name    string
	id      int64
	group   int64
	members string // separated by commas
}

// User is the identity of a process.
type User struct {
	UID    int64   `json:"uid"`
	GID    int64   `json:"gid"`
	Groups []int64 `json:"groups,omitempty"` // supplemental groups
}

// AddUsers adds the users of /etc/passwd. Like Docker, it ignores invalid lines.
func (a *Accounts) AddUsers(passwd io.Reader) error {
	return eachLine(passwd, func(f []string) { // name:password:uid:gid:…
		if len(f) < 4 {
			return
		}
		uid, ok := parseID(f[2])
		gid, okGroup := parseID(f[3])
		if ok && okGroup {
			a.users = append(a.users, account{name: f[0], id: uid, group: gid})
		}
	})
}

// AddGroups does the same for the groups of /etc/group.
func (a *Accounts) AddGroups(group io.Reader) error {
	return eachLine(group, func(f []string) { // name:password:gid:members
		if len(f) < 3 {
			return
		}
		if gid, ok := parseID(f[2]); ok {
			g := account{name: f[0], id: gid}
			if len(f) > 3 {
				g.members = f[3]
			}
			a.groups = append(a.groups, g)
		}
	})
}

// eachLine calls add with the fields of each line.
func eachLine(r io.Reader, add func(fields []string)) error {
	limited := &io.LimitedReader{R: r, N: MaxAccountFile + 1}
	lines := bufio.NewScanner(limited)
	lines.Buffer(nil, maxAccountLine)
	for lines.Scan() {
		if line := strings.TrimSpace(lines.Text()); line != "" && line[0] != '#' {
			add(strings.Split(line, ":"))
		}
	}

	switch {
	case lines.Err() != nil:
		return fmt.Errorf("%w: %w", lines.Err(), errdefs.ErrDataLoss)
	case limited.N == 0:
		return fmt.Errorf("more than %d bytes: %w", MaxAccountFile, errdefs.ErrDataLoss)
	}

	return nil
}

func parseID(s string) (int64, bool) {
	n, err := strconv.ParseInt(s, 10, 64)
	return n, err == nil && n >= 0 && n <= maxID
}

// Resolve returns the identity for a user in Docker's form user[:group], by name or ID, with the
// groups of the image that have the user as a member. "" is root. An unknown name is NotFound. The
// rules are Docker's, but for the groups: Docker omits them if spec names a group.
func (a *Accounts) Resolve(spec string) (User, error) {
	name, group, hasGroup := strings.Cut(spec, ":")
	if name == "" {
		name = "0"
	}

	var u User
	uid, isID := parseID(name)
	i := slices.IndexFunc(a.users, func(x account) bool { return x.name == name || isID && x.id == uid })
	switch {
	case i >= 0:
		u.UID, u.GID = a.users[i].id, a.users[i].group
		u.Groups = a.groupsOf(a.users[i].name)
	case isID:
		u.UID = uid
	default:
		return User{}, fmt.Errorf("user %q is not in the image's /etc/passwd: %w", name, errdefs.ErrNotFound)
	}

	if !hasGroup || group == "" {
		return u, nil
	}

	gid, isID := parseID(group)
	i = slices.IndexFunc(a.groups, func(x account) bool { return x.name == group || isID && x.id == gid })
	switch {
	case i >= 0:
		u.GID = a.groups[i].id
	case isID:
		u.GID = gid
	default:
		return User{}, fmt.Errorf("group %q is not in the image's /etc/group: %w", group, errdefs.ErrNotFound)
	}

	return u, nil
}

// groupsOf returns the groups that have a user as a member.
func (a *Accounts) groupsOf(user string) (all []int64) {
	for _, g := range a.groups {
		for m := range strings.SplitSeq(g.members, ",") {
			if m == user && !slices.Contains(all, g.id) {
				all = append(all, g.id)
			}
		}
	}
	return all
}
