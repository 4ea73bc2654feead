package rootonly

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"cri-dockerd/internal/proc"
)

// PeerError reports that a process of another user listens, or may listen, where root's is
// expected.
type PeerError struct{ reason string }

func (e *PeerError) Error() string { return e.reason }

// Dial connects to a unix socket or a TCP address. A listener on this machine must be root, because
// any user can listen on loopback and in some directories.
func Dial(ctx context.Context, network, address string) (net.Conn, error) {
	if network == "unix" {
		if err := checkSocketDirectory(address); err != nil {
			return nil, &PeerError{fmt.Sprintf("another user can replace %s (%v)", address, err)}
		}
	}

	c, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}

	if network == "unix" {
		err = checkPeer(c, address)
	} else {
		err = checkListeners(c)
	}

	if err != nil {
		return nil, errors.Join(err, c.Close())
	}

	return c, nil
}

// EngineDial returns a dial function for a Docker endpoint; empty means DOCKER_HOST. It returns nil
// for endpoint types handled only by Docker's client, and if a certificate authenticates the peer.
func EngineDial(endpoint string) func(context.Context) (net.Conn, error) {
	network, address := EngineAddress(endpoint)
	if network == "" || network == "tcp" && endpoint == "" && os.Getenv("DOCKER_CERT_PATH") != "" {
		return nil
	}
	return func(ctx context.Context) (net.Conn, error) { return Dial(ctx, network, address) }
}

// EngineAddress returns Docker's network and address in the form of net.Dial. See EngineDial.
func EngineAddress(endpoint string) (network, address string) {
	if endpoint == "" {
		endpoint = os.Getenv("DOCKER_HOST")
	}

	network, address, _ = strings.Cut(endpoint, "://")
	if network != "unix" && network != "tcp" {
		return "", ""
	}

	return network, address
}

// checkPeer returns an error unless root listens on the unix socket (SO_PEERCRED, unix(7)).
func checkPeer(c net.Conn, path string) error {
	cred, err := Peer(c)
	switch {
	case err != nil:
		return &PeerError{fmt.Sprintf("cannot determine which user listens at %s (%v)", path, err)}
	case !TrustedUser(cred.Uid):
		return &PeerError{fmt.Sprintf("a process of user %d listens at %s", cred.Uid, path)}
	}

	return nil
}

// Peer returns the credentials of the listener at the other end of a connection (SO_PEERCRED,
// unix(7)).
func Peer(c net.Conn) (*unix.Ucred, error) {
	u, isUnix := c.(*net.UnixConn)
	if !isUnix {
		return nil, errors.New("not a unix socket")
	}

	raw, err := u.SyscallConn()
	if err != nil {
		return nil, err
	}

	var cred *unix.Ucred
	var optErr error
	err = raw.Control(func(fd uintptr) {
		cred, optErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})

	return cred, errors.Join(err, optErr)
}

// checkListeners returns an error unless root owns all sockets of this machine that can have
// accepted the connection. It accepts remote machines, because their certificates authenticate
// them.
func checkListeners(c net.Conn) error {
	remote, local := parseAddrPort(c.RemoteAddr()), parseAddrPort(c.LocalAddr())
	if !remote.Addr().IsLoopback() && remote.Addr() != local.Addr() {
		return nil
	}

	self, err := proc.Host().Open("self")
	if err != nil {
		return &PeerError{"cannot determine which user listens at " + remote.String()}
	}
	defer self.Close()

	known := false
	for _, l := range Listeners(self) {
		if l.At.Port() != remote.Port() || !l.At.Addr().IsUnspecified() && l.At.Addr() != remote.Addr() {
			continue
		}
		if !TrustedUser(l.User) {
			return &PeerError{fmt.Sprintf("a process of user %d listens at %s", l.User, l.At)}
		}
		known = true
	}

	if !known {
		return &PeerError{"cannot determine which user listens at " + remote.String()}
	}

	return nil
}

func parseAddrPort(a net.Addr) netip.AddrPort {
	ap, err := netip.ParseAddrPort(a.String())
	if err != nil {
		return netip.AddrPort{}
	}
	return netip.AddrPortFrom(ap.Addr().Unmap().WithZone(""), ap.Port())
}

// Listener is a listening TCP socket: a line of /proc/net/tcp.
type Listener struct {
	At    netip.AddrPort
	User  uint32
	Inode string
}

// maxTable limits the tables of sockets, in bytes: 150 bytes for each of 100,000 sockets.
const maxTable = 16 << 20

// Listeners returns the listening TCP sockets in the network namespace of a process.
func Listeners(d proc.Dir) []Listener {
	var out []Listener
	for _, table := range []string{"net/tcp", "net/tcp6"} {
		b, err := d.ReadFile(table, maxTable)
		if err != nil {
			continue
		}

		for line := range strings.Lines(string(b)) {
			f := strings.Fields(line)
			if len(f) < 10 || f[3] != "0A" { // TCP_LISTEN
				continue
			}

			at, err := parseHexAddress(f[1])
			user, userErr := strconv.ParseUint(f[7], 10, 32)
			if err == nil && userErr == nil {
				out = append(out, Listener{at, uint32(user), f[9]})
			}
		}
	}

	return out
}

// parseHexAddress parses an address of /proc/net/tcp: 32-bit words in the byte order of the
// machine.
func parseHexAddress(s string) (netip.AddrPort, error) {
	address, port, _ := strings.Cut(s, ":")
	n, err := strconv.ParseUint(port, 16, 16)
	if err != nil || len(address) != 8 && len(address) != 32 {
		return netip.AddrPort{}, errors.New("not an address")
	}

	var raw []byte
	for i := 0; i < len(address); i += 8 {
		word, err := strconv.ParseUint(address[i:i+8], 16, 32)
		if err != nil {
			return netip.AddrPort{}, err
		}
		raw = binary.NativeEndian.AppendUint32(raw, uint32(word))
	}

	ip, _ := netip.AddrFromSlice(raw) // 4 or 16 bytes

	return netip.AddrPortFrom(ip.Unmap(), uint16(n)), nil
}
