# Functions for scripts that unpack packages of Debian 13, without any change of the machine's apt lists and packages. The packages come from the
# machine's own Debian mirror; apt checks their signatures with the keys of debian-archive-keyring. MIRROR=http://… names another mirror.
suite=trixie
arch=$(dpkg --print-architecture)

# prepare_apt DIR: lets apt-get and dpkg-deb of this shell use an empty machine in DIR, with the lists of Debian 13
prepare_apt() {
	local dir=$1 mirror keys=/usr/share/keyrings/debian-archive-keyring.gpg
	[ -s "$keys" ] || { echo "$(basename "$0"): $keys is missing; install debian-archive-keyring" >&2; exit 1; }

	# The first archive of Debian itself in the machine's sources, not that of security updates or of another vendor.
	mirror=${MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -m1 '/debian/*$' || true)}
	mirror=${mirror:-http://deb.debian.org/debian}

	mkdir -p "$dir/apt/lists/partial" "$dir/apt/archives/partial"
	: > "$dir/apt/status"
	echo "deb [arch=$arch signed-by=$keys] $mirror $suite main" > "$dir/apt/sources.list"
	cat > "$dir/apt.conf" <<EOF
Dir::Etc::SourceList "$dir/apt/sources.list";
Dir::Etc::SourceParts "/dev/null";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
Dir::State::Lists "$dir/apt/lists";
Dir::State::Status "$dir/apt/status";
Dir::Cache "$dir/apt";
Dir::Cache::Archives "$dir/apt/archives";
Acquire::Languages "none";
Acquire::Retries "3";
APT::Sandbox::User "";
APT::Get::List-Cleanup "false";
EOF
	export APT_CONFIG=$dir/apt.conf
	apt-get -qq update
}
