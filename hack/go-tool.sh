# Sourced by hack/lint.sh and hack/audit.sh. The caller sets $cache, the directory of the tools.

# install NAME MODULE VERSION builds a Go tool as $cache/NAME-VERSION, unless it exists.
install() {
	[ -x "$cache/$1-$3" ] && return
	GOBIN=$cache go install -trimpath "$2@$3"
	mv "$cache/$1" "$cache/$1-$3"
}
